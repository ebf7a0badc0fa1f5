"""Who may lease how much: the ledger's arithmetic, in one process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine

from kvcached.errors import InvalidArgumentError, LedgerError
from kvcached.ledger import Account, Ledger, Member

DEVICE = "host:test"


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "ledger", DEVICE, 110, headroom_bytes=10) as opened:
        yield opened


def test_lease_create_release(ledger: Ledger) -> None:
    account, member = ledger.join("a", "chat"), ledger.attach("a", "chat")
    assert (account.leasable(), account.ceiling(), account.charge()) == (100, 100, 0)
    assert account.lease(60)
    assert not account.lease(41)
    assert account.lease(40)
    assert account.leasable() == 0
    member.created(70)
    assert (account.charge(), member.held()) == (100, 70)
    account.give_back(30)
    assert (account.charge(), account.leasable()) == (70, 30)
    member.released(50)
    assert (account.charge(), account.leasable(), member.held()) == (20, 80, 20)
    seen = ledger.snapshot()
    assert (seen.charge, seen.free, seen.high_water, seen.consistent) == (20, 80, 100, True)
    (row,) = seen.accounts
    assert (row.leased, row.created, row.granted, row.refused) == (20, 20, 2, 1)


def test_more_than_there_is_cannot_be_given_back(ledger: Ledger) -> None:
    account, member = ledger.join("a", "chat"), ledger.attach("a", "chat")
    assert account.lease(60)
    member.created(50)
    with pytest.raises(InvalidArgumentError, match="gave back 11"):
        account.give_back(11)
    with pytest.raises(InvalidArgumentError, match="released 51"):
        member.released(51)
    for call in (account.lease, account.give_back, member.created, member.released, member.pin):
        with pytest.raises(InvalidArgumentError, match="-1 bytes"):
            call(-1)
    assert (account.charge(), member.held()) == (60, 50)
    assert not account.lease((1 << 63) - 1)


def test_a_limit_holds_and_can_be_lifted(ledger: Ledger) -> None:
    account = ledger.join("a", "chat")
    ledger.set_limit("chat", 30)
    assert not account.lease(31)
    assert account.lease(30)
    assert account.ceiling() == 30
    ledger.set_limit("a", 10)  # below what is held: no more, and the overage can be seen
    assert (account.leasable(), account.ceiling(), account.charge()) == (0, 10, 30)
    ledger.set_limit("a", None)
    assert account.leasable() == 70
    assert ledger.snapshot().accounts[0].limit is None


def test_a_guarantee_is_kept_for_its_account(ledger: Ledger) -> None:
    first, second = ledger.join("a", "first"), ledger.join("b", "second")
    ledger.set_guarantee("second", 40)
    assert (first.ceiling(), first.leasable(), second.leasable()) == (60, 60, 100)
    assert not first.lease(61)
    assert first.lease(60)
    assert second.lease(40)
    assert not second.lease(1)


def test_a_floor_is_served_before_others_gave_back_all(ledger: Ledger) -> None:
    first, second, third = (ledger.join(key, key) for key in "abc")
    assert first.lease(80)
    ledger.set_guarantee("b", 50)
    ledger.set_guarantee("c", 30)
    assert (first.leasable(), second.leasable(), third.leasable()) == (0, 20, 20)
    assert second.lease(15)
    assert third.lease(5)
    assert ledger.snapshot().charge == 100
    first.give_back(60)
    assert (first.leasable(), second.leasable(), third.leasable()) == (0, 35, 25)


def test_guarantees_must_fit(ledger: Ledger) -> None:
    ledger.join("a", "first"), ledger.join("b", "second")
    keep = [ledger.join("c", "third"), ledger.join("d", "fourth", pinned_bytes=5)]
    ledger.set_guarantee("c", 60)
    with pytest.raises(InvalidArgumentError, match=r"101 bytes.*100 bytes"):
        ledger.set_guarantee("d", 41)
    ledger.set_guarantee("d", 40)
    with pytest.raises(InvalidArgumentError, match=r"100 bytes.*99 bytes"):
        ledger.set_capacity(109)
    with pytest.raises(InvalidArgumentError, match=r"100 bytes.*99 bytes"):
        ledger.set_capacity(headroom_bytes=11)
    ledger.set_capacity(111, 11)
    assert (ledger.capacity, ledger.headroom) == (111, 11)
    with pytest.raises(LedgerError, match=r"101 bytes.*100 bytes"):
        ledger.join("e", "fifth", pinned_bytes=1)
    assert ledger.snapshot().account("e") is None
    assert len(keep) == 2


def test_senseless_settings(ledger: Ledger) -> None:
    keep = [ledger.join("a", "same"), ledger.join("b", "same"), ledger.join("c", "c")]
    ledger.set_guarantee("c", 20)
    for call in (
        lambda: ledger.set_limit("c", 19),
        lambda: ledger.set_guarantee("c", -1),
        lambda: ledger.set_limit("c", -1),
        lambda: ledger.set_weight("c", 0),
        lambda: ledger.set_weight("c", float("nan")),
        lambda: ledger.set_limit("same", 50),
        lambda: ledger.set_limit("nobody", 50),
        lambda: ledger.set_capacity(10),
        lambda: ledger.join("", "empty"),
        lambda: ledger.join("x" * 48, "long"),
    ):
        with pytest.raises(InvalidArgumentError):
            call()
    ledger.set_limit("c", 20)
    with pytest.raises(InvalidArgumentError, match=r"guarantee 21.*limit 20"):
        ledger.set_guarantee("c", 21)
    ledger.set_weight("a", 2.5)
    assert [row.weight for row in ledger.snapshot().accounts] == [2.5, 1.0, 1.0]
    assert len(keep) == 3


def test_pinned_bytes_are_a_guarantee_and_above_the_limit(ledger: Ledger) -> None:
    first, second = ledger.join("a", "a"), ledger.join("b", "b", pinned_bytes=8)
    assert (first.leasable(), second.leasable()) == (92, 100)
    ledger.set_limit("b", 2)
    assert (second.ceiling(), second.leasable()) == (8, 8)


def test_pin_then_take_over(ledger: Ledger) -> None:
    member = ledger.attach("a", "chat", pinned_bytes=8)
    assert member.pin(8)
    (row,) = ledger.snapshot().accounts
    assert (row.leased, row.created, row.charge, row.owner_pid) == (0, 8, 8, None)
    account = ledger.join("a", "chat", pinned_bytes=8)
    assert (account.charge(), account.leasable()) == (8, 92)
    assert account.lease(2)
    assert member.pin(1)  # with an owner the bytes count beside what is leased
    assert account.charge() == 11
    member.created(2)
    member.released(11)
    assert account.charge() == 0
    account.close()
    member.close()
    assert ledger.snapshot().accounts == ()


def test_a_refused_pin_is_demand_until_it_is_granted(ledger: Ledger) -> None:
    first = ledger.join("a", "a")
    assert first.lease(97)
    member = ledger.attach("b", "b", pinned_bytes=8)
    pressure = first.pressure_seq
    assert not member.pin(8)
    assert (first.others_demand(), first.wait_pressure(pressure, 0)) == (8, pressure + 1)
    assert ledger.snapshot().accounts[1].demand == 8
    first.give_back(4)
    assert not member.pin(8)
    first.give_back(1)
    assert member.pin(8)
    assert first.others_demand() == 0


def test_an_account_changes_hands(ledger: Ledger) -> None:
    member = ledger.attach("a", "chat")
    first = ledger.join("a", "chat")
    with pytest.raises(LedgerError, match="has an owner"):
        ledger.join("a", "chat")
    assert first.lease(50)
    member.created(20)
    first.close()
    assert ledger.snapshot().charge == 20  # what was leased only counted for the owner
    second = ledger.join("a", "chat")
    assert (second.charge(), second.leasable()) == (20, 80)
    member.released(20)
    assert second.charge() == 0


def test_a_members_row_is_used_again(ledger: Ledger) -> None:
    account = ledger.join("a", "chat")
    assert account.lease(80)
    for _ in range(3):
        member = ledger.attach("a", "chat")
        member.created(25)
        member.released(5)
        member.close()  # the other 20 go with it, and their lease too
        member.close()
    assert account.charge() == 5
    assert ledger.snapshot().accounts[0].members == ()


def test_rows_run_out_with_an_error(ledger: Ledger) -> None:
    members = [ledger.attach("a", "a") for _ in range(16)]
    with pytest.raises(LedgerError, match="16 living members"):
        ledger.attach("a", "a")
    members.pop().close()
    members.append(ledger.attach("a", "a"))
    accounts = [ledger.join(str(i), "n") for i in range(63)]
    with pytest.raises(LedgerError, match="64 accounts"):
        ledger.join("one more", "n")
    assert len(ledger.snapshot().accounts) == 64
    del accounts
    assert len(ledger.snapshot().accounts) == 1


def test_names_are_cut_and_numbers_shown(ledger: Ledger) -> None:
    account = ledger.join("a", "é" * 40)
    account.publish(1, 2, 3)
    account.set_ready()
    account.count_reclaimed(3)
    account.count_reclaimed(1)
    account.set_demand(5)
    (row,) = ledger.snapshot().accounts
    assert row.name == "é" * 31
    assert (row.in_use, row.cached, row.warm, row.reclaimed, row.demand) == (1, 2, 3, 4, 5)
    assert row.reclaims == 2
    assert row.ready and row.alive and row.pids == (row.owner_pid,)


def test_a_closed_handle_does_nothing(ledger: Ledger) -> None:
    account, member = ledger.join("a", "a"), ledger.attach("a", "a")
    ledger.close()
    ledger.close()
    account.give_back(5)
    account.set_demand(5)
    account.publish(1, 1, 1)
    member.released(5)
    assert (account.leasable(), account.ceiling(), account.charge(), member.held()) == (0, 0, 0, 0)
    assert account.wait_freed(7, 10) == 7
    assert member.lock_fd == -1
    for call in (
        lambda: account.lease(1),
        lambda: member.pin(1),
        lambda: member.created(1),
        ledger.snapshot,
        ledger.reap,
        lambda: ledger.join("b", "b"),
    ):
        with pytest.raises(LedgerError, match="closed"):
            call()
    account.close()
    member.close()


@dataclass
class ModelMember:
    """One process of an account. ``row`` orders those that wait to set memory aside."""

    handle: Member
    row: int
    held: int = 0
    aside: int = 0
    beside: int = 0
    """The foreign memory on top of which it was set aside."""
    waits: bool = False

    def to_come(self, foreign: int) -> int:
        return min(self.aside, max(0, self.beside + self.aside - foreign))


@dataclass
class ModelAccount:
    """What one account should hold, in plain numbers."""

    handle: Account
    members: list[ModelMember] = field(default_factory=list)
    leased: int = 0
    guarantee: int = 0
    limit: int = 1 << 62

    @property
    def held(self) -> int:
        return sum(member.held for member in self.members)


SIZES = st.integers(0, 60)


class LedgerMachine(RuleBasedStateMachine):
    """Random operations; the ledger's numbers must be those of the model after each of them."""

    path: Path

    @initialize()
    def open(self) -> None:
        for old in self.path.glob("ledger*"):
            old.unlink()
        self.ledger = Ledger.open(self.path, DEVICE, 110, headroom_bytes=10)
        self.accounts = [
            ModelAccount(self.ledger.join(str(i), str(i)), guarantee=0) for i in range(3)
        ]
        self.peak = 0
        self.foreign = 0

    @property
    def aside(self) -> int:
        return sum(
            member.to_come(self.foreign) for account in self.accounts for member in account.members
        )

    def model_leasable(self, index: int) -> int:
        mine = self.accounts[index]
        others = self.accounts[:index] + self.accounts[index + 1 :]
        claims = sum(max(other.leased, other.guarantee) for other in others)
        held = sum(other.leased for other in others)
        there = 100 - self.foreign - self.aside
        best = 0
        for size in range(min(100, mine.limit - mine.leased) + 1):
            charge = mine.leased + size
            fits = claims + max(charge, mine.guarantee) <= there
            sure = charge <= mine.guarantee and held + charge <= there
            best = size if fits or sure else best
        return best

    @rule(index=st.integers(0, 2), size=SIZES)
    def lease(self, index: int, size: int) -> None:
        account = self.accounts[index]
        granted = size <= self.model_leasable(index)
        assert account.handle.lease(size) == granted
        if granted:
            account.leased += size
            self.peak = max(self.peak, sum(each.leased for each in self.accounts))

    @rule(index=st.integers(0, 2))
    def attach(self, index: int) -> None:
        if len(self.accounts[index].members) < 3:
            rows = {member.row for member in self.accounts[index].members}
            member = self.ledger.attach(str(index), "")
            free = next(row for row in range(3) if row not in rows)
            self.accounts[index].members.append(ModelMember(member, free))

    @rule(index=st.integers(0, 2), which=st.integers(0, 2), size=SIZES)
    def create(self, index: int, which: int, size: int) -> None:
        account = self.accounts[index]
        if which < len(account.members):
            size = min(size, account.leased - account.held)
            member = account.members[which]
            member.handle.created(size)
            member.held += size

    @rule(index=st.integers(0, 2), which=st.integers(0, 2), size=SIZES, leave=st.booleans())
    def release(self, index: int, which: int, size: int, leave: bool) -> None:
        account = self.accounts[index]
        if which < len(account.members):
            member = account.members[which]
            size = member.held if leave else min(size, member.held)
            member.handle.close() if leave else member.handle.released(size)
            member.held -= size
            account.leased -= size
            if leave:
                del account.members[which]

    @rule(size=SIZES)
    def measure(self, size: int) -> None:
        self.ledger.set_foreign(size)
        self.foreign = size

    @rule(index=st.integers(0, 2), which=st.integers(0, 2), size=SIZES)
    def set_aside(self, index: int, which: int, size: int) -> None:
        if which >= len(self.accounts[index].members):
            return
        member = self.accounts[index].members[which]
        others = [
            (number, other)
            for number, account in enumerate(self.accounts)
            for other in account.members
            if other is not member
        ]
        before = sum(
            other.to_come(self.foreign)
            for number, other in others
            if (number, other.row) < (index, member.row) or not other.waits
        )
        there = 100 - self.foreign - before - sum(each.leased for each in self.accounts)
        had = size <= member.aside and not member.waits
        granted = size <= max(there, 0) or had
        assert member.handle.set_aside(size) == granted
        if not had:
            theirs = (other.to_come(self.foreign) for _, other in others if not other.waits)
            member.beside = self.foreign + sum(theirs)
        member.aside, member.waits = size, not granted

    @rule(index=st.integers(0, 2), size=SIZES)
    def give_back(self, index: int, size: int) -> None:
        account = self.accounts[index]
        size = min(size, account.leased - account.held)
        account.handle.give_back(size)
        account.leased -= size

    @rule(index=st.integers(0, 2), size=SIZES)
    def guarantee(self, index: int, size: int) -> None:
        account = self.accounts[index]
        total = sum(each.guarantee for each in self.accounts) - account.guarantee + size
        if total <= 100 and size <= account.limit:
            self.ledger.set_guarantee(str(index), size)
            account.guarantee = size
        else:
            with pytest.raises(InvalidArgumentError):
                self.ledger.set_guarantee(str(index), size)

    @rule(index=st.integers(0, 2), size=SIZES)
    def limit(self, index: int, size: int) -> None:
        self.accounts[index].limit = max(size, self.accounts[index].guarantee)
        self.ledger.set_limit(str(index), self.accounts[index].limit)

    @precondition(lambda self: hasattr(self, "accounts"))
    @invariant()
    def numbers_agree(self) -> None:
        seen = self.ledger.snapshot()
        assert seen.consistent
        assert seen.high_water == self.peak <= 100
        assert (seen.foreign, seen.set_aside) == (self.foreign, self.aside)
        for index, (row, account) in enumerate(zip(seen.accounts, self.accounts, strict=True)):
            assert (row.leased, row.created) == (account.leased, account.held)
            assert row.charge == account.handle.charge() == account.leased
            assert account.handle.leasable() == self.model_leasable(index)

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            self.ledger.close()


def test_random_operations_agree_with_the_model(tmp_path: Path) -> None:
    LedgerMachine.path = tmp_path
    run_machine(
        LedgerMachine,
        settings=settings(
            max_examples=60,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=20))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_an_owner_can_never_lease_past_the_capacity(sizes: list[int], tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("ledger")
    with Ledger.open(path, DEVICE, 110, headroom_bytes=10) as ledger:
        account = ledger.join("a", "a")
        total = 0
        for size in sizes:
            if account.lease(size):
                total += size
            assert account.leasable() == 100 - total
        assert total <= 100
