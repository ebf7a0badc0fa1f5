"""What is in use on a device beside pages: leases leave it alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcached import foreign
from kvcached.errors import InvalidArgumentError, LedgerError
from kvcached.ledger import Account, Ledger, Member


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "ledger", "host:test", 110, headroom_bytes=10) as opened:
        yield opened


@pytest.fixture
def busy(ledger: Ledger) -> tuple[Account, Member]:
    """An engine that holds 60 of the 100 bytes that can be lent."""
    account, member = ledger.join("a", "busy"), ledger.attach("a", "busy")
    assert account.lease(60)
    member.created(60)
    return account, member


def test_leases_and_the_ceiling_leave_foreign_memory_alone(
    ledger: Ledger, busy: tuple[Account, Member]
) -> None:
    account, _ = busy
    ledger.set_foreign(25)
    assert (account.leasable(), account.ceiling(), ledger.snapshot().free) == (15, 75, 15)
    assert not account.lease(16)
    ledger.set_foreign(90)  # more than there is room for beside what is held
    assert (account.leasable(), account.ceiling(), ledger.snapshot().free) == (0, 10, -50)
    assert not account.lease(1)
    ledger.set_foreign(0)
    assert account.lease(40)


def test_guarantees_are_held_against_the_settings_not_against_the_moment(ledger: Ledger) -> None:
    account = ledger.join("a", "a")
    ledger.set_foreign(50)
    ledger.set_guarantee("a", 80)
    assert account.leasable() == 50
    ledger.set_foreign(10)
    assert account.leasable() == 90


def test_less_foreign_memory_wakes_who_waits_for_memory(ledger: Ledger) -> None:
    account = ledger.join("a", "a")
    ledger.set_foreign(50)
    seen = account.freed_seq
    ledger.set_foreign(50)
    ledger.set_foreign(60)
    assert account.freed_seq == seen
    ledger.set_foreign(10)
    assert account.freed_seq != seen


def test_what_a_starting_engine_needs_is_kept_and_asked_for(
    ledger: Ledger, busy: tuple[Account, Member]
) -> None:
    account, member = busy
    starting = ledger.attach("b", "starting")
    seen = account.pressure_seq
    assert not starting.set_aside(70)
    assert account.pressure_seq != seen
    assert (account.others_demand(), account.leasable()) == (30, 0)
    member.released(20)
    assert account.leasable() == 0, "what comes back gathers for the one that waits"
    assert not starting.set_aside(70)
    assert account.others_demand() == 10
    member.released(10)
    assert starting.set_aside(70)
    assert account.others_demand() == 0
    seen = account.freed_seq
    assert starting.set_aside(0)
    assert (account.leasable(), account.freed_seq != seen) == (70, True)


def test_of_two_that_start_at_once_one_goes_on(ledger: Ledger) -> None:
    first, second = ledger.attach("a", "first"), ledger.attach("b", "second")
    assert first.set_aside(70)
    assert not second.set_aside(60), "the first has it already"
    assert first.set_aside(0)
    assert second.set_aside(60)
    assert not first.set_aside(70)
    assert second.set_aside(60), "and keeps it against one that came later"
    ledger.set_foreign(60)  # the second has loaded
    assert second.set_aside(0)
    assert not first.set_aside(70)
    ledger.set_foreign(30)
    assert first.set_aside(70)


def test_both_wait_and_the_one_before_goes_first(
    ledger: Ledger, busy: tuple[Account, Member]
) -> None:
    _, member = busy
    first, second = ledger.attach("b", "first"), ledger.attach("c", "second")
    assert not second.set_aside(70)
    assert not first.set_aside(70)
    member.released(60)
    assert not second.set_aside(70)
    assert first.set_aside(70)


def test_what_is_set_aside_ends_with_the_member(ledger: Ledger) -> None:
    account = ledger.join("a", "a")
    with ledger.attach("b", "b") as starting:
        assert starting.set_aside(40)
        (row,) = ledger.snapshot().accounts[1].members
        assert (account.leasable(), row.set_aside, ledger.snapshot().set_aside) == (60, 40, 40)
    assert (account.leasable(), ledger.snapshot().set_aside) == (100, 0)


def test_senseless_sizes_and_closed_handles(ledger: Ledger) -> None:
    member = ledger.attach("a", "a")
    for call in (ledger.set_foreign, member.set_aside):
        with pytest.raises(InvalidArgumentError, match="-1 bytes"):
            call(-1)
    ledger.close()
    for call in (ledger.set_foreign, member.set_aside):
        with pytest.raises(LedgerError, match="closed"):
            call(1)


def test_foreign_is_what_is_used_and_nobodys_page(
    ledger: Ledger, busy: tuple[Account, Member]
) -> None:
    foreign.refresh(ledger, lambda: (75, 110))
    assert ledger.snapshot().foreign == 15
    foreign.refresh(ledger, lambda: (40, 110))  # pages are booked before they exist
    assert ledger.snapshot().foreign == 0


def test_foreign_memory_lies_where_the_ledger_does_not_govern_first(
    ledger: Ledger, busy: tuple[Account, Member]
) -> None:
    foreign.refresh(ledger, lambda: (75, 120))
    assert ledger.snapshot().foreign == 5
    foreign.refresh(ledger, lambda: (75, 200))
    assert ledger.snapshot().foreign == 0


def test_pages_that_come_meanwhile_are_not_foreign(
    ledger: Ledger, busy: tuple[Account, Member]
) -> None:
    _, member = busy
    used = iter([65, 70, 75])

    def memory() -> tuple[int, int]:
        now = next(used, 75)
        if now < 75:
            member.created(5)  # booked, and there at the next question
        return now, 110

    assert foreign.measure(ledger, memory) == 5
    assert member.held() == 70


def test_under_steady_change_it_says_rather_too_much(
    ledger: Ledger, busy: tuple[Account, Member]
) -> None:
    _, member = busy
    device = [60]

    def memory() -> tuple[int, int]:
        device[0] += 1
        member.created(1)
        return device[0], 110

    assert 0 <= foreign.measure(ledger, memory) <= 1


def test_one_measurement_serves_all_who_look(
    tmp_path: Path, ledger: Ledger, busy: tuple[Account, Member]
) -> None:
    """Several handles stand for several engines; the device is asked by the first one only."""
    asked = 0

    def memory() -> tuple[int, int]:
        nonlocal asked
        asked += 1
        return 85, 110

    assert ledger.foreign_age_s() == math.inf and ledger.created() == 60
    with Ledger.open(tmp_path / "ledger", "host:test", create=False) as other:
        assert other.created() == 60
        for each in (ledger, other, ledger, other):
            foreign.keep_fresh(each, memory, 30.0)
        assert other.snapshot().foreign == 25 and 0 <= other.foreign_age_s() < 30
        once = asked
        foreign.keep_fresh(other, memory, 0.0)  # old enough by any clock
        assert 0 < once < asked == 2 * once
