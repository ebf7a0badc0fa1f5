"""The thread of an engine that waits for pressure: what is urgent, and what may wait."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvcached.engines import surroundings
from kvcached.engines.surroundings import Lookout
from kvcached.ledger import Account, Ledger

CAPACITY = 1 << 20
PAGE = 4096


class Watched:
    """A lookout in a thread of its own, and what it has yielded."""

    def __init__(self, lookout: Lookout) -> None:
        self.seen: list[bool] = []
        self.at_once: Callable[[], None] = lambda: None
        self._lookout = lookout
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        for rose in self._lookout.rounds():
            self.at_once()
            self.seen.append(rose)

    def ended(self) -> bool:
        self._thread.join(10)
        return not self._thread.is_alive()


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path, "host:lookout", CAPACITY) as opened:
        yield opened


@pytest.fixture
def mine(ledger: Ledger) -> Account:
    return ledger.join("mine", "mine")


def until(condition: Callable[[], object]) -> None:
    end_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.002)


def test_pressure_is_told_at_once_and_the_log_waits_until_it_is_calm(
    ledger: Ledger, mine: Account, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kvcached")
    other_ledger = Ledger.open(tmp_path, "host:lookout", create=False)
    now_s = [0.0]  # the log has one line a second at most
    watched = Watched(Lookout(mine, ledger, None, "mine", clock=lambda: now_s[0]))
    lines: list[int] = []
    watched.at_once = lambda: lines.append(len(caplog.records))
    now_s[0] = 2.0
    other = other_ledger.join("other", "other")
    time.sleep(0.05)
    assert not caplog.records, "nothing has woken it"
    other.set_demand(PAGE)
    until(lambda: caplog.records)
    assert "other: joined" in caplog.text
    assert watched.seen == [True], "to write the log is no reason to ask the engine"
    assert lines == [0], "the engine is asked first"
    ledger.close()
    assert watched.ended()
    other_ledger.close()


def test_at_every_tick_it_looks_around_first_also_under_constant_pressure(
    ledger: Ledger, mine: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(surroundings, "FOREIGN_TICK_S", 0.1)
    used = [3 * PAGE]
    watched = Watched(Lookout(mine, ledger, lambda: (used[0], CAPACITY), "mine"))
    until(lambda: False in watched.seen)
    assert ledger.snapshot().foreign == 3 * PAGE
    other_ledger = Ledger.open(tmp_path, "host:lookout", create=False)
    other = other_ledger.join("other", "other")
    before, end_s = len(watched.seen), time.monotonic() + 0.5
    while time.monotonic() < end_s:
        other.set_demand(PAGE)
        other.set_demand(0)
        time.sleep(0.01)
    told = watched.seen[before:]
    assert told.count(True) > 10 and told.count(False) >= 2
    ledger.close()
    assert watched.ended()
    other_ledger.close()


def test_who_has_little_to_give_is_asked_when_it_is_calm_or_has_waited_long_enough(
    ledger: Ledger, mine: Account, tmp_path: Path
) -> None:
    now_s = [0.0]
    has_much = [False]
    watched = Watched(
        Lookout(mine, ledger, None, "mine", lambda: has_much[0], clock=lambda: now_s[0])
    )
    other_ledger = Ledger.open(tmp_path, "host:lookout", create=False)
    other = other_ledger.join("other", "other")

    def press() -> None:
        other.set_demand(PAGE)
        other.set_demand(0)

    press()
    until(lambda: watched.seen == [True])  # its wait has ended, and nobody asked meanwhile
    end_s = time.monotonic() + 3 * surroundings.CALM_S
    while time.monotonic() < end_s:
        press()
        time.sleep(0.001)
    now_s[0] += surroundings.CALM_S
    press()
    until(lambda: len(watched.seen) > 1)
    has_much[0] = True
    before = len(watched.seen)
    press()
    until(lambda: len(watched.seen) > before)
    assert all(watched.seen)
    ledger.close()
    assert watched.ended()
    other_ledger.close()
