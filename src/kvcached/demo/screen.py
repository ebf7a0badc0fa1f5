"""What the demo shows while it runs: a live table, or plain lines where there is no terminal."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kvcached.cli.accounts import LedgerFigures
from kvcached.demo.load import Result
from kvcached.demo.sampler import Sample
from kvcached.units import format_size

BAR_WIDTH = 28


@dataclass(slots=True)
class Counts:
    """Requests of one engine in the phase that runs."""

    waiting: int = 0
    streaming: int = 0
    finished: int = 0
    failed: int = 0
    ttft_ms: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the live table gets memory figures; None in configurations that have none."""

    engines: tuple[str, ...]
    budget_bytes: int
    static_bytes: int | None
    sample: Callable[[], Sample | None]
    ledger: Callable[[], LedgerFigures | None]


class Screen:
    """Progress lines and the live table. The table redraws in a thread of its own."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._started_s = time.monotonic()
        self._counts: dict[str, Counts] = {}

    def say(self, text: str) -> None:
        elapsed = time.monotonic() - self._started_s
        self.console.print(f"[dim]{elapsed:6.1f} s[/dim]  {text}", highlight=False, soft_wrap=True)

    def observe(self, result: Result, event: str) -> None:
        """Counts an event of the load generator."""
        counts = self._counts.setdefault(result.request.engine, Counts())
        if event == "sent":
            counts.waiting += 1
        elif event == "first":
            counts.waiting -= 1
            counts.streaming += 1
            counts.ttft_ms.append(result.ttft_ms or 0.0)
        elif event == "done":
            if result.first_s is None:
                counts.waiting -= 1
            else:
                counts.streaming -= 1
            counts.finished += result.ok
            counts.failed += not result.ok

    @contextlib.contextmanager
    def phase(self, title: str, sources: Sources) -> Iterator[None]:
        """Shows the table while a phase runs."""
        self._counts = {name: Counts() for name in sources.engines}
        if not self.console.is_terminal:
            yield
            return
        with Live(
            console=self.console,
            refresh_per_second=4,
            transient=True,
            get_renderable=lambda: self._table(title, sources),
        ):
            yield

    def _table(self, title: str, sources: Sources) -> Table:
        sample, ledger = sources.sample(), sources.ledger()
        table = Table(title=title, title_style="bold", title_justify="left", expand=False)
        table.add_column("engine")
        table.add_column(f"KV memory (budget {format_size(sources.budget_bytes)})")
        for heading in ("physical", "in use", "cached", "warm"):
            table.add_column(heading, justify="right", min_width=9)
        for heading in ("waiting", "running", "done", "failed", "TTFT"):
            table.add_column(heading, justify="right")
        for index, name in enumerate(sources.engines):
            held = sources.static_bytes
            if held is None:
                held = sample.engine_bytes[index] if sample else 0
            account = ledger.account(name) if ledger else None
            memory = (
                [format_size(b) for b in (account.in_use, account.cached, account.warm)]
                if account
                else ["", "", ""]
            )
            counts = self._counts[name]
            ttft = f"{statistics.fmean(counts.ttft_ms) / 1e3:.2f} s" if counts.ttft_ms else ""
            requests = (counts.waiting, counts.streaming, counts.finished, counts.failed)
            table.add_row(
                name,
                _bar(held, sources.budget_bytes),
                format_size(held),
                *memory,
                *(str(count) for count in requests),
                ttft,
            )
        return table


def _bar(value: int, whole: int) -> Text:
    filled = min(BAR_WIDTH, round(BAR_WIDTH * value / whole))
    return Text("█" * filled, "cyan") + Text("·" * (BAR_WIDTH - filled), "dim")
