"""``kvcached bench watchers``: whether those who look at a ledger slow those who use it.

One engine's scheduler is played on a real ledger: it hands out blocks and takes them back, leases
pages, publishes. Meanwhile ``kvctl watch -n 0.1``, kvtop (on a terminal of its own) and the
exporter look at that ledger, or nobody does, in turns.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvcached.config import child_environment
from kvcached.errors import KvcachedError
from kvcached.ledger import Account, Ledger
from kvcached.pages import PagePool
from kvcached.vmm_ops import Blocks

DEVICE = "host:bench"
PAGE = 2 << 20
PER_PAGE = 16
PAGES = 1024
BATCH = 256
START_S = 30.0
SETTLE_S = 2.0
_now = time.perf_counter_ns

# A terminal of its own: pty.spawn passes on what is written to it, and ends when it does.
_ON_A_TERMINAL = "import pty, sys; pty.spawn(sys.argv[1:])"


def run(pairs: int, seconds: float, progress: Callable[[str], None]) -> dict[str, Any]:
    """Pairs of phases of so many seconds each. Times are microseconds an operation, medians over
    batches; a ratio is watched over alone, and the result's the median over pairs.
    """
    found: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory(prefix="kvcached-bench-") as directory:
        folder = Path(directory) / "ledger"
        with Ledger.open(folder, DEVICE, (PAGES + 1) * PAGE) as ledger:
            account = ledger.join("0" * 32, "bench", pinned_bytes=PAGE)
            engine = _Engine(account)
            for index in range(pairs):
                phases: dict[str, dict[str, float]] = {}
                for watched in (True, False) if index % 2 else (False, True):
                    with watchers(folder) if watched else contextlib.nullcontext():
                        time.sleep(SETTLE_S)
                        phases["watched" if watched else "alone"] = engine.measure(seconds)
                found.append(phases)
                progress(f"pair {index + 1} of {pairs}")
            account.close()
    keys = list(found[0]["alone"])
    return {
        "pairs": found,
        "alone_us": {k: round(statistics.median(p["alone"][k] for p in found), 4) for k in keys},
        "watched_us": {
            k: round(statistics.median(p["watched"][k] for p in found), 4) for k in keys
        },
        "ratio": {
            k: round(statistics.median(p["watched"][k] / p["alone"][k] for p in found), 4)
            for k in keys
        },
    }


class _Engine:
    """What a scheduler does with the ledger."""

    def __init__(self, account: Account) -> None:
        self._account = account
        self._blocks = Blocks(PAGES * PER_PAGE, PER_PAGE)
        self._pool = PagePool(
            self._blocks, account, PAGE, warm_low=0, warm_high=PAGES, on_evict=lambda _: None
        )
        self._pool.ensure(PAGES // 2 * PER_PAGE)

    def measure(self, seconds: float) -> dict[str, float]:
        """Medians over batches, in microseconds."""
        times: dict[str, list[float]] = {"alloc_us": [], "free_us": [], "lease_us": []}
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            held: list[Any] = []
            start = _now()
            for _ in range(BATCH):
                self._pool.ensure(1)
                held.append(self._blocks.alloc(1))
            times["alloc_us"].append((_now() - start) / BATCH / 1e3)
            start = _now()
            for ids in held:
                self._blocks.free(ids)
            times["free_us"].append((_now() - start) / BATCH / 1e3)
            start = _now()
            for _ in range(BATCH):
                self._account.lease(PAGE)
                self._account.give_back(PAGE)
                self._account.publish(PAGE, PAGE, 0)
            times["lease_us"].append((_now() - start) / BATCH / 1e3)
        return {key: statistics.median(values) for key, values in times.items()}


@contextlib.contextmanager
def watchers(folder: Path) -> Iterator[None]:
    """All three, looking at the ledger by the time that the block begins."""
    environment = child_environment({"KVCACHED_DIR": str(folder), "TERM": "xterm-256color"})
    module = [sys.executable, "-m"]
    kvtop = [*module, "kvcached.cli.top.command"]
    commands = [
        [*module, "kvcached.cli.kvctl", "watch", "-n", "0.1", "--json"],
        [sys.executable, "-c", _ON_A_TERMINAL, *kvtop],
        [*module, "kvcached.cli.main", "exporter", "--port", "0"],
    ]
    with contextlib.ExitStack() as stack:
        started = []
        for number, command in enumerate(commands):
            output = stack.enter_context((folder.parent / f"watcher-{number}").open("wb"))
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )
            stack.callback(process.wait)
            stack.callback(process.terminate)
            started.append(process)
        words = ('"schema"', "bench", "metrics on")
        _wait_for(started, [folder.parent / f"watcher-{n}" for n in range(3)], words)
        yield
        _check_alive(started)


def _wait_for(
    started: list[subprocess.Popen[bytes]], outputs: list[Path], words: tuple[str, ...]
) -> None:
    """Until each has said its word: it has read the ledger."""
    end_s = time.monotonic() + START_S
    while not all(w in o.read_text(errors="replace") for w, o in zip(words, outputs, strict=True)):
        _check_alive(started)
        if time.monotonic() > end_s:
            raise KvcachedError(f"a watcher did not start within {START_S:g} s")
        time.sleep(0.05)
    address = outputs[2].read_text().split("metrics on ")[1].split("/metrics")[0]
    with urllib.request.urlopen(f"{address}/api/v1/state") as reply:
        if not json.load(reply)["devices"]:
            raise KvcachedError("the exporter sees no ledger")


def _check_alive(started: list[subprocess.Popen[bytes]]) -> None:
    for process in started:
        if process.poll() is not None:
            raise KvcachedError(f"a watcher ended: {process.args!r}")
