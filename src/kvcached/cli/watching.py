"""``kvctl watch``: the list again and again, or what happens as lines of text or JSON."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kvcached.cli.edge import complain, one_line
from kvcached.cli.listing import NOTHING, observer, table
from kvcached.cli.output import document, event_document, ledger_fields
from kvcached.events import Event, between
from kvcached.observe import Observer
from kvcached.snapshot import LedgerSnapshot

CLEAR = "\x1b[H\x1b[2J"
"""Moves a terminal's cursor to the top and clears what is below."""


@dataclass(slots=True)
class History:
    """The last look at every device, and what has happened since the one before."""

    last: dict[str, LedgerSnapshot] = field(default_factory=dict)

    def events(self, now: Iterable[LedgerSnapshot]) -> list[Event]:
        """What has happened since the last call. A ledger that is gone is forgotten."""
        found = {each.device: each for each in now}
        events = [e for name, each in found.items() for e in between(self.last.get(name), each)]
        self.last = found
        return events


def watch(device: str, interval_s: float, count: int, events: bool, as_json: bool) -> int:
    """Looks every ``interval_s`` seconds, ``count`` times or until it is interrupted (0)."""
    history, said = History(), ""
    with observer(device) as looks:
        next_s = time.monotonic()
        for number in itertools.count(1):
            found = looks.read()
            said = _say_problems(looks, bool(found), said)
            if events:
                _say_events(history.events(found), as_json)
            else:
                _say_list(found, as_json)
            if number == count:
                return 0
            next_s += interval_s
            time.sleep(max(0.0, next_s - time.monotonic()))
    return 0


def _say_problems(looks: Observer, found: bool, said: str) -> str:
    """Says once what cannot be read; returns what stands now."""
    problems = "; ".join(looks.problems.values())
    if not problems and not found:
        problems = f"{looks.directory}: {NOTHING}"
    if problems and problems != said:
        complain("kvctl", problems)
    return problems


def _say_events(events: Sequence[Event], as_json: bool) -> None:
    now_s = time.time()
    clock = time.strftime("%H:%M:%S", time.localtime(now_s)) + f".{int(now_s % 1 * 1000):03}"
    for event in events:
        print(event_document(event, now_s) if as_json else f"{clock} {one_line(str(event))}")
    sys.stdout.flush()  # somebody may read the lines at the other end of a pipe


def _say_list(found: Sequence[LedgerSnapshot], as_json: bool) -> None:
    if as_json:
        devices = [ledger_fields(each) for each in found]
        print(document("list", {"time_s": round(time.time(), 3), "devices": devices}))
    else:
        lines = "".join(f"{line}\n" for each in found for line in table(each))
        # One write, so that a terminal never shows half of it.
        sys.stdout.write(CLEAR + lines if sys.stdout.isatty() else lines)
    sys.stdout.flush()
