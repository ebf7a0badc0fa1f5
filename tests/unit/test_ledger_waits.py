"""What an account publishes about waits, its cache, and what operators ask of it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from page_pools import PAGE, PER_PAGE, Instance

from kvcached.errors import InvalidArgumentError
from kvcached.ledger import Account, Ledger
from kvcached.snapshot import WAIT_BOUNDS_US, AccountSnapshot


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "ledger", "host:test", 16 * PAGE) as opened:
        yield opened


def seen(ledger: Ledger, name: str) -> AccountSnapshot:
    account = ledger.snapshot().account(name)
    assert account is not None
    return account


@pytest.fixture
def full(ledger: Ledger) -> Account:
    """An account whose leases are refused until ``other`` gives something back."""
    other = ledger.join("other", "other")
    assert other.lease(16 * PAGE)
    account = ledger.join("one", "one")
    assert not account.lease(4 * PAGE)
    return account


def test_a_wait_lasts_from_the_demand_to_the_lease(ledger: Ledger, full: Account) -> None:
    assert seen(ledger, "one").waits == 0
    full.set_demand(4 * PAGE)
    time.sleep(0.02)
    full.set_demand(8 * PAGE)  # more is wanted: still the same wait
    ledger.core.set_capacity(20 * PAGE, None)
    assert full.lease(4 * PAGE)
    found = seen(ledger, "one")
    assert found.waits == 1 and 20_000 <= found.waited_us == found.longest_wait_us < 500_000
    bucket = next(i for i, bound in enumerate(WAIT_BOUNDS_US) if found.waited_us < bound)
    assert found.wait_buckets == tuple(int(i == bucket) for i in range(13))
    full.set_demand(0)
    full.set_demand(PAGE)
    ledger.core.set_capacity(21 * PAGE, None)
    assert full.lease(PAGE)
    after = seen(ledger, "one")
    assert after.waits == sum(after.wait_buckets) == 2
    assert after.longest_wait_us == found.longest_wait_us < after.waited_us


def test_a_demand_that_is_given_up_is_no_wait(ledger: Ledger, full: Account) -> None:
    full.set_demand(4 * PAGE)
    full.set_demand(0)
    ledger.core.set_capacity(20 * PAGE, None)
    assert full.lease(4 * PAGE)
    assert seen(ledger, "one").waits == 0


def test_smaller_leases_end_a_wait_only_with_the_demand(ledger: Ledger, full: Account) -> None:
    full.set_demand(4 * PAGE)
    ledger.core.set_capacity(17 * PAGE, None)
    assert full.lease(PAGE)
    assert seen(ledger, "one").waits == 0
    full.set_demand(0)
    assert seen(ledger, "one").waits == 1


def test_the_cache_is_counted_where_tools_see_it(ledger: Ledger) -> None:
    one = Instance(ledger, "one", max_cached_blocks=4)
    held = one.alloc(8)
    one.blocks.free(held, cached=True)
    one.pool.settle(idle=True)  # four are too many
    one.blocks.touch(held[6:])
    one.pool.publish()
    found = seen(ledger, "one")
    assert (found.hits, found.misses, found.evictions) == (2, 8, 4)
    one.blocks.free(held[6:], cached=True)
    assert one.pool.give_up(2) == 2
    one.pool.publish()
    assert seen(ledger, "one").evictions_by_pressure == one.pool.counters.evicted_blocks > 0


@pytest.mark.parametrize("cap", [0, 5, None])
def test_the_cache_is_bounded_as_it_is_told(ledger: Ledger, cap: int | None) -> None:
    """None of it, so many blocks, or all: after every step, the oldest go first."""
    one = Instance(ledger, "one", pages=16, max_cached_blocks=cap)
    freed: list[int] = []
    for _ in range(5):
        held = one.alloc(PER_PAGE)
        one.blocks.free(held, cached=True)
        freed += held
        one.pool.settle(idle=False)
        most = len(set(freed)) if cap is None else cap
        assert one.blocks.cached_blocks == min(len(set(freed)), most)
        one.check()
    if cap == 0:
        assert one.evicted == freed
    if cap is None:
        assert one.evicted == []


def test_what_an_operator_asks_for_is_given_and_answered(ledger: Ledger) -> None:
    one = Instance(ledger, "one")
    one.blocks.free(one.alloc(6 * PER_PAGE), cached=True)
    one.carry()
    ledger.set_guarantee("one", 16 * PAGE)  # of what it does not use, an operator may have all
    before = one.charged_pages
    pressure = one.account.pressure_seq
    ledger.ask_back("one", 2 * PAGE)
    assert one.account.pressure_seq != pressure and one.account.pressed()
    assert seen(ledger, "one").asked == 2 * PAGE
    assert one.pool.relieve() == 2 * PAGE
    one.carry()
    found = seen(ledger, "one")
    assert (found.asked, found.reclaimed) == (0, 2 * PAGE)
    assert one.charged_pages == before - 2 and not one.account.pressed()
    ledger.ask_back("one", 100 * PAGE)
    one.pool.relieve()
    one.carry()
    assert one.charged_pages == 1 and seen(ledger, "one").asked == 0
    one.check()


def test_nobody_is_asked_who_cannot_answer(ledger: Ledger) -> None:
    with pytest.raises(InvalidArgumentError, match="no account"):
        ledger.ask_back("nobody", 1)
    member = ledger.attach("one", "one")
    with pytest.raises(InvalidArgumentError, match="no scheduler"):
        ledger.ask_back("one", 1)
    member.close()


def test_a_new_owner_has_not_been_asked(ledger: Ledger) -> None:
    member = ledger.attach("one", "one")
    first = ledger.join("one", "one")
    ledger.ask_back("one", PAGE)
    first.close()
    assert ledger.join("one", "one").asked() == 0
    member.close()


ENDS_WHILE_A_THREAD_WAITS = """
import sys, threading, time
from pathlib import Path
from kvcached.ledger import Ledger

ledger = Ledger.open(Path(sys.argv[1]), "host:ends", 1 << 24)
account = ledger.join("a" * 32, "ends", 4096)

def follow():
    while ledger.core.usable:
        account.wait_pressure(account.pressure_seq, 60.0)

threading.Thread(target=follow, daemon=True).start()
time.sleep(0.2)

class Holder:
    def __del__(self):
        ledger.close()  # rings the bell on which the thread sleeps
        time.sleep(0.2)

sys.modules["holder"] = Holder()  # goes when the interpreter has begun to end
raise RuntimeError("as an engine that fails")
"""


def test_a_thread_that_waits_does_not_end_a_process_that_ends(tmp_path: Path) -> None:
    """A daemon thread that wakes while the interpreter ends must not take the process down."""
    done = subprocess.run(
        [sys.executable, "-c", ENDS_WHILE_A_THREAD_WAITS, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1, done.stderr
    assert "as an engine that fails" in done.stderr and "terminate" not in done.stderr
