"""One instance on several devices: leases on all of them or on none, and nobody waits for ever."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from page_pools import PAGE, PER_PAGE

from kvcached.config import Config
from kvcached.engines.devices import join
from kvcached.group import AccountGroup, grouped
from kvcached.ledger import Account, Ledger
from kvcached.pages import PagePool
from kvcached.vmm_ops import Blocks

A, B = "host:a", "host:b"
PAGES_A, PAGES_B = 20, 12


@pytest.fixture
def ledgers(tmp_path: Path) -> Iterator[tuple[Ledger, Ledger]]:
    with (
        Ledger.open(tmp_path, A, PAGES_A * PAGE) as a,
        Ledger.open(tmp_path, B, PAGES_B * PAGE) as b,
    ):
        yield a, b


class Ranks:
    """A page pool on several devices, and a member on each; commands are carried out at once."""

    def __init__(self, ledgers: Sequence[Ledger], name: str, pages: int = 40) -> None:
        self.members = [ledger.attach(name, name, PAGE) for ledger in ledgers]
        assert all(member.pin(PAGE) for member in self.members)
        self.accounts = [ledger.join(name, name, PAGE) for ledger in ledgers]
        self.account = grouped(self.accounts, PAGE)
        self.mapped = {0}
        self.now_s = 0.0
        self.pool = PagePool(
            Blocks(pages * PER_PAGE, PER_PAGE),
            self.account,
            PAGE,
            warm_low=0,
            warm_high=1,
            clock=lambda: self.now_s,
            on_evict=lambda ids: None,
        )
        self.pool.publish()

    def carry(self) -> None:
        commands = self.pool.take_commands()
        if commands is not None:
            fresh = {*commands.map, *commands.ahead} - self.mapped
            for member in self.members:
                member.released(len(commands.unmap) * PAGE)
                member.created(len(fresh) * PAGE)
            self.mapped = self.mapped - {*commands.unmap} | fresh
        self.pool.publish()

    def start(self, blocks: int) -> list[int] | None:
        """A request of so many blocks; None where there is no memory for it."""
        self.pool.relieve()
        ids = None
        if not self.pool.closed and self.pool.ensure(blocks):
            self.account.set_demand(0)
            ids = self.pool.blocks.alloc(blocks)
        self.pool.settle(idle=ids is None and self.pool.blocks.used_blocks <= 1)
        self.carry()
        return ids

    def end(self, ids: list[int], cached: bool) -> None:
        self.pool.blocks.free(ids, cached)
        self.pool.settle(idle=self.pool.blocks.used_blocks <= 1)
        self.carry()

    def rest(self) -> None:
        """What an idle engine does when it is woken."""
        self.pool.relieve()
        self.carry()

    def charged(self) -> list[int]:
        return [account.charge() // PAGE for account in self.accounts]


def charges(ledger: Ledger) -> int:
    return ledger.snapshot().charge // PAGE


def test_one_device_needs_no_group(ledgers: tuple[Ledger, Ledger]) -> None:
    account = ledgers[0].join("i", "i")
    assert grouped([account], PAGE) is account


def test_a_lease_is_on_all_devices_or_on_none(ledgers: tuple[Ledger, Ledger]) -> None:
    group = AccountGroup([ledger.join("i", "i") for ledger in ledgers], PAGE)
    assert group.lease(10 * PAGE)
    assert [charges(ledger) for ledger in ledgers] == [10, 10]
    assert (group.leasable(), group.ceiling()) == (2 * PAGE, PAGES_B * PAGE), "the smaller decides"
    freed = group.freed_seq
    assert not group.lease(3 * PAGE)
    assert [charges(ledger) for ledger in ledgers] == [10, 10]
    assert group.freed_seq == freed, "nothing was granted that had to be undone"
    group.give_back(10 * PAGE)
    assert group.charge() == 0


def test_what_one_device_refuses_late_is_given_back_on_the_others(
    ledgers: tuple[Ledger, Ledger], monkeypatch: pytest.MonkeyPatch
) -> None:
    """B's memory goes between the look at it and the lease."""
    accounts = [ledger.join("i", "i") for ledger in ledgers]
    group, rival = AccountGroup(accounts, PAGE), ledgers[1].join("r", "r")
    lease = accounts[0].lease

    def lose_b(size_bytes: int) -> bool:
        assert rival.lease(PAGES_B * PAGE)
        return lease(size_bytes)

    monkeypatch.setattr(accounts[0], "lease", lose_b)
    assert not group.lease(PAGE)
    assert accounts[0].charge() == 0 and accounts[1].charge() == 0
    assert ledgers[0].snapshot().high_water == PAGE, "it was granted for a moment"


def test_demand_stands_where_memory_is_free_and_keeps_it(ledgers: tuple[Ledger, Ledger]) -> None:
    """B is full of somebody's cache, A is empty: meanwhile nobody may fill A."""
    waiting = Ranks(ledgers, "waiting")
    cache, other = Ranks(ledgers[1:], "cache"), Ranks(ledgers[:1], "other")
    ids = cache.start(PER_PAGE * (PAGES_B - 1) - 1)
    assert ids is not None
    cache.end(ids, cached=True)
    assert charges(ledgers[1]) == PAGES_B
    assert waiting.start(PER_PAGE * 6 - 1) is None
    assert [account.demand for account in own(ledgers, "waiting")] == [5 * PAGE, 5 * PAGE]
    assert other.start(PER_PAGE * (PAGES_A - 6)) is None, "5 pages of it are not his"
    assert other.start(PER_PAGE * (PAGES_A - 6) - 1) is not None
    cache.rest()
    assert waiting.start(PER_PAGE * 6 - 1) is not None
    assert [account.demand for account in own(ledgers, "waiting")] == [0, 0]
    assert waiting.charged() == [6, 6]


def own(ledgers: Sequence[Ledger], name: str) -> list:  # type: ignore[type-arg]
    return [ledger.snapshot().account(name) for ledger in ledgers]


def test_nobody_gives_what_the_smaller_device_could_not_match(
    ledgers: tuple[Ledger, Ledger],
) -> None:
    """On B its fair share is half of 12 pages: more than that it cannot use on A either."""
    greedy, cache, busy = (
        Ranks(ledgers, "greedy"),
        Ranks(ledgers[:1], "cache"),
        Ranks(ledgers[1:], "busy"),
    )
    filled = cache.start(PER_PAGE * (PAGES_A - 1) - 1)
    assert filled is not None
    cache.end(filled, cached=True)
    assert busy.start(PER_PAGE * (PAGES_B - 1) - 1) is not None
    busy.account.set_demand(PAGES_B * PAGE)
    assert greedy.start(PER_PAGE * 30) is None
    on_a, on_b = own(ledgers, "greedy")
    assert on_a.demand == (PAGES_B // 2 - 1) * PAGE < on_b.demand
    cache.rest()
    assert cache.charged() == [PAGES_A - PAGES_B // 2]


@pytest.mark.parametrize("number", [0, 1])
def test_pressure_on_any_device_takes_a_page_from_all(
    ledgers: tuple[Ledger, Ledger], number: int
) -> None:
    group = Ranks(ledgers, "group")
    ids = group.start(PER_PAGE * 8 - 1)
    assert ids is not None
    group.end(ids, cached=True)
    before = group.charged()[0]
    rival = ledgers[number].join("r", "r")
    assert not group.account.pressed()
    rival.set_demand((ledgers[number].capacity // PAGE - before + 2) * PAGE)
    assert group.account.pressed()
    group.now_s = 1.0  # its cache is not its working set any more
    group.rest()
    assert group.charged() == [before - 2, before - 2]


@pytest.mark.parametrize("number", [0, 1])
def test_it_sleeps_until_memory_comes_back_where_it_is_short(
    ledgers: tuple[Ledger, Ledger], number: int
) -> None:
    group = AccountGroup([ledger.join("i", "i") for ledger in ledgers], PAGE)
    ledger = ledgers[number]
    holder = Ledger.open(ledger.path.parent, ledger.device).join("h", "h")
    assert holder.lease(ledger.capacity)
    seen = group.freed_seq
    assert not group.lease(PAGE)
    start = time.monotonic()
    assert group.wait_freed(seen, 0.05) == seen and time.monotonic() - start >= 0.04
    timer = threading.Timer(0.05, holder.give_back, [PAGE])
    timer.start()
    start = time.monotonic()
    assert group.wait_freed(seen, 20) != seen and time.monotonic() - start < 10
    timer.join()
    assert group.wait_freed(seen, 20) != seen, "what came before the call counts"
    assert group.lease(PAGE)


def test_two_that_ask_at_the_same_time_never_hold_a_device_each(tmp_path: Path) -> None:
    """Threads with handles of their own, in opposite order, for memory that is enough for one."""
    names = [A, B]
    for name in names:
        Ledger.open(tmp_path, name, 3 * PAGE).close()
    granted = [0, 0]

    def take_turns(number: int, over: float) -> None:
        ordered = names if number == 0 else names[::-1]
        ledgers = [Ledger.open(tmp_path, name, create=False) for name in ordered]
        group = AccountGroup([each.join(f"i{number}", "") for each in ledgers], PAGE)
        while time.monotonic() < over:
            seen = group.freed_seq
            if group.lease(2 * PAGE):
                granted[number] += 1
                group.give_back(2 * PAGE)
            else:
                group.wait_freed(seen, 0.01)
        for each in ledgers:
            each.close()

    over = time.monotonic() + 0.5
    threads = [threading.Thread(target=take_turns, args=(n, over)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert min(granted) > 5, granted
    for name in names:
        with Ledger.open(tmp_path, name, create=False) as ledger:
            assert ledger.snapshot().high_water <= 3 * PAGE and ledger.snapshot().charge == 0


class Interrupted:
    """Lets others act in the middle of a group's lease, between one device and the next."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice
        self.others: list[Ranks] = []
        self._deep = False
        self._taken: list[tuple[Ranks, int]] = []

    def let_go(self) -> None:
        """What others took meanwhile comes back."""
        while self._taken:
            other, size = self._taken.pop()
            other.account.give_back(size)

    def watch(self, account: Account, own: Ranks) -> None:
        lease = account.lease

        def interrupted(size_bytes: int) -> bool:
            if not self._deep and self.dice.random() < 0.5:
                self._deep = True
                other = self.dice.choice([each for each in self.others if each is not own])
                if other.account.lease(size := PAGE * self.dice.randint(1, 4)):
                    self._taken.append((other, size))
                self._deep = False
            return lease(size_bytes)

        account.lease = interrupted  # type: ignore[method-assign]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("places", [("ab", "ba", "a", "b"), ("ab", "bc", "ca", "cba")])
def test_everyone_gets_on_whatever_the_order(
    tmp_path: Path, places: tuple[str, ...], seed: int
) -> None:
    """Two instances on the same devices, in opposite order, and one on either; or a ring of them
    and one on all. More is wanted than is there: nothing is lent twice, and every request gets
    its turn.
    """
    dice = random.Random(seed)
    sizes = {name: dice.randint(12, 24) for name in sorted({*"".join(places)})}
    ledgers = {
        name: Ledger.open(tmp_path, f"host:{name}", size * PAGE) for name, size in sizes.items()
    }
    everyone = [Ranks([ledgers[name] for name in place], place) for place in places]
    between = Interrupted(dice)
    between.others = everyone
    for each in everyone:
        for account in each.accounts:
            between.watch(account, each)
    running: list[list[tuple[int, list[int]]]] = [[] for _ in everyone]
    done, waited, longest = [0] * 4, [0] * 4, 0
    wanted = [0] * 4
    for now in range(1500):
        number = dice.randrange(4)
        each = everyone[number]
        each.now_s = now / 100
        for until, ids in [job for job in running[number] if job[0] <= now]:
            running[number].remove((until, ids))
            each.end(ids, cached=dice.random() < 0.5)
            done[number] += 1
        wanted[number] = wanted[number] or dice.randint(1, 3 * PER_PAGE)
        ids = each.start(wanted[number])
        waited[number] = 0 if ids is not None else waited[number] + 1
        longest = max(longest, waited[number])
        if ids is not None:
            running[number].append((now + dice.randint(1, 40), ids))
            wanted[number] = 0
        between.let_go()
        for name, ledger in ledgers.items():
            assert charges(ledger) <= sizes[name]
            assert ledger.snapshot().high_water <= sizes[name] * PAGE
        each.pool.check()
        for other in everyone:
            present = other.pool.blocks.present_pages
            assert other.charged() == [present] * len(other.accounts)
    assert min(done) > 50, done
    assert longest < 120, "no request waits long where others end after 40 steps at most"
    for ledger in ledgers.values():
        ledger.close()


def test_an_engine_joins_every_device_as_its_environment_says(
    ledgers: tuple[Ledger, Ledger],
) -> None:
    said = {"KVCACHED_LIMIT": "50%", "KVCACHED_GUARANTEE": "25%", "KVCACHED_WEIGHT": "2.5"}
    accounts = join(Config.from_env(said), ledgers, "id", "chat", PAGE)
    for ledger, account, pages in zip(ledgers, accounts, (PAGES_A, PAGES_B), strict=True):
        assert account.device == ledger.device
        seen = ledger.snapshot().account("id")
        assert seen is not None and (seen.name, seen.pinned, seen.weight) == ("chat", PAGE, 2.5)
        assert (seen.limit, seen.guarantee) == (pages * PAGE // 2, pages * PAGE // 4)
