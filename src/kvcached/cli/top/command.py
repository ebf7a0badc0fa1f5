"""The command ``kvtop``."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from typing import Annotated

import typer

from kvcached.cli import edge
from kvcached.cli.options import complete_device
from kvcached.errors import LedgerError

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode="rich")
_ONCE_S = 1.0


@app.command()
def kvtop(
    interval: Annotated[
        float, typer.Option("--interval", "-n", min=0.05, max=3600, help="Seconds between looks.")
    ] = 1.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print one look as plain text, for logs.")
    ] = False,
    device: Annotated[
        str,
        typer.Option(
            help="One device; all shared ones if not given.", autocompletion=complete_device
        ),
    ] = "",
) -> int:
    """Devices and instances, live: what is in use, cached and warm under limits and guarantees, and
    how fast pages come and go. Works in 80 columns and 24 lines.

    Keys: s sorts, / filters, l sets the limit of the chosen instance, d goes to the next device,
    q quits.

    Examples:

      kvtop

      kvtop -n 0.2 --device host:demo

      kvtop --once >> memory.log
    """
    if once:
        for line in _once(device, min(interval, _ONCE_S)):
            print(line)
        return 0
    try:
        from kvcached.cli.top.app import KvTop
    except ModuleNotFoundError as error:
        edge.complain("kvtop", f"{error}; the screen needs: pip install 'kvcached[tools]'")
        return edge.FAILED
    from kvcached.cli.listing import observer

    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        edge.complain("kvtop", "this is no terminal: kvtop --once prints plain text")
        return edge.WRONG_USE
    # Also under nohup: a screen without its terminal is of no use, and textual's threads spin.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with observer(device) as looks:
        KvTop(looks, interval, set_limit).run()
    return 0


def _once(device: str, interval_s: float) -> Iterator[str]:
    """Two looks, so that there are rates, as lines."""
    from kvcached.cli.listing import NOTHING, observer
    from kvcached.cli.top import text
    from kvcached.cli.top.rates import Looks, ordered

    taken = Looks()
    with observer(device) as looks:
        taken.take(looks.read(), time.monotonic())
        time.sleep(interval_s)
        views = taken.take(looks.read(), time.monotonic())
        if not views:
            problems = "; ".join(looks.problems.values())
            raise LedgerError(problems or f"{looks.directory}: {NOTHING}")
    bar_width = text.COLUMNS[1][1]
    yield time.strftime("%Y-%m-%d %H:%M:%S")
    for view in views:
        yield text.title(view)
        yield "".join(text.headings(bar_width)).rstrip()
        for line in ordered(view.lines, "charge"):
            yield "".join(text.cells(line, bar_width)).rstrip()


def set_limit(device: str, instance: str, limit: str) -> str:
    """Sets it at once; what has come of it is seen on the screen."""
    from kvcached.control import open_pool
    from kvcached.units import format_size

    amount = None if limit.lower() == "none" else limit
    with open_pool(device) as pool:
        account = pool.set_limit(instance, amount, wait_s=0).account
    said = "none" if account.limit is None else format_size(account.limit)
    return f"{edge.one_line(account.name)}: limit {said}"


def main() -> None:
    """The process's edge."""
    edge.run_app(app, "kvtop")


if __name__ == "__main__":
    main()
