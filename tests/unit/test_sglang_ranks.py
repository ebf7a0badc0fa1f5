"""The ranks of an SGLang engine come to the same decisions, whatever happens to the ledger."""

from __future__ import annotations

import os
import queue
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import pytest
from page_pools import PAGE, PER_PAGE

from kvcached.engines.sglang import ranks
from kvcached.engines.sglang.ranks import AgreedAccount, AgreedClock, FirstRank, Rank
from kvcached.errors import EngineError, LedgerBusyError
from kvcached.group import AccountGroup, grouped
from kvcached.ledger import Account, Ledger
from kvcached.pages import PagePool
from kvcached.vmm_ops import Blocks

A, B = "host:a", "host:b"
PAGES = 24
SHAPE = b"shape"


Meet = Callable[[int], list[Rank]]


@pytest.fixture
def meet() -> Iterator[Meet]:
    """Makes so many ranks of one engine."""
    made: list[Rank] = []

    def make(count: int) -> list[Rank]:
        found = gathered(count)
        made.extend(found)
        return found

    yield make
    for rank in made:
        rank.close()


def gathered(count: int, mine: Callable[[int], bytes] = lambda number: SHAPE) -> list[Rank]:
    """Ranks of one engine; each in a thread of its own while they meet."""
    queues: list[queue.Queue[bytes]] = [queue.Queue() for _ in range(count)]

    def share_of(number: int) -> Callable[[bytes], bytes]:
        def share(data: bytes) -> bytes:
            if number == 0:
                for each in queues[1:]:
                    each.put(data)
                return data
            return queues[number].get(timeout=10)

        return share

    with ThreadPoolExecutor(count) as threads:
        found = [
            threads.submit(ranks.gather, number, count, share_of(number), mine(number))
            for number in range(count)
        ]
        wait(found)
    met = [each.result()[1] for each in found if each.exception() is None]
    if len(met) < count:
        for rank in met:
            rank.close()
        raise next(error for each in found if (error := each.exception()) is not None)
    assert len({each.result()[0] for each in found}) == 1, "one instance"
    return met


@pytest.fixture
def ledgers(tmp_path: Path) -> Iterator[tuple[Ledger, Ledger]]:
    with (
        Ledger.open(tmp_path, A, PAGES * PAGE) as a,
        Ledger.open(tmp_path, B, PAGES * PAGE) as b,
    ):
        yield a, b


@contextmanager
def engine(ledgers: tuple[Ledger, Ledger], found: list[Rank]) -> Iterator[AccountGroup]:
    accounts = [ledger.join("tp", "tp", PAGE) for ledger in ledgers]
    group = grouped(accounts, PAGE)
    assert isinstance(group, AccountGroup) and isinstance(found[0], FirstRank)
    found[0].accounts = group
    yield group
    group.close()


def test_every_rank_gets_the_answers_of_the_first(
    meet: Meet, ledgers: tuple[Ledger, Ledger]
) -> None:
    found = meet(3)
    assert {rank.pids for rank in found} == {(os.getpid(),), (os.getpid(),) * 2}
    with engine(ledgers, found), ledgers[1].join("rival", "rival", PAGE) as rival:
        rival.lease(4 * PAGE)
        rival.set_demand(30 * PAGE)
        questions: list[Callable[[AgreedAccount], object]] = [
            lambda each: each.lease(3 * PAGE),
            lambda each: each.lease(99 * PAGE),
            lambda each: each.leasable(),
            lambda each: each.ceiling(),
            lambda each: each.charge(),
            lambda each: each.others_demand(),
            lambda each: each.pressed(),
            lambda each: each.version(),
            lambda each: each.target(PAGE, demand=7 * PAGE),
            lambda each: each.reap(),
            lambda each: each.asked(),
            lambda each: each.freed_seq,
            lambda each: each.wait_freed(0, 0.01),
        ]
        answers = [[ask(AgreedAccount(rank)) for ask in questions] for rank in found]
        assert answers[0] == answers[1] == answers[2]
        assert answers[0][:3] == [True, False, (PAGES - 4 - 3) * PAGE]
        assert answers[0][5] == 30 * PAGE
        clocks = [AgreedClock(rank) for rank in found]
        for clock in clocks:
            clock.turn()
        assert clocks[0]() == clocks[1]() == clocks[2]() > 0


def test_what_is_said_is_said_once(meet: Meet, ledgers: tuple[Ledger, Ledger]) -> None:
    found = meet(2)
    with engine(ledgers, found) as group:
        accounts = [AgreedAccount(rank) for rank in found]
        for each in accounts:
            assert each.lease(4 * PAGE)
        for each in accounts:
            each.give_back(3 * PAGE)
        assert group.charge() == PAGE
        for each in accounts:
            each.set_demand(2 * PAGE)
            each.publish(PAGE, 0, 0)
            each.set_ready()
        snapshot = ledgers[0].snapshot().account("tp")
        assert snapshot is not None and snapshot.in_use == PAGE and snapshot.ready


def test_a_busy_ledger_is_an_answer_too(meet: Meet) -> None:
    first, other = meet(2)
    assert isinstance(first, FirstRank)

    class Busy:
        def reap(self) -> int:
            raise LedgerBusyError("busy")

    first.accounts = Busy()
    for rank in (first, other):
        with pytest.raises(LedgerBusyError):
            AgreedAccount(rank).reap()


def test_ranks_that_went_different_ways_end(meet: Meet, ledgers: tuple[Ledger, Ledger]) -> None:
    found = meet(2)
    with engine(ledgers, found):
        first, other = map(AgreedAccount, found)
        first.pressed()
        with pytest.raises(EngineError, match=r"for lease\(\d+,\) where the first .* for pressed"):
            other.lease(PAGE)


def test_the_same_question_about_something_else_is_another_way(
    meet: Meet, ledgers: tuple[Ledger, Ledger]
) -> None:
    found = meet(2)
    with engine(ledgers, found):
        first, other = map(AgreedAccount, found)
        first.lease(PAGE)
        with pytest.raises(EngineError, match="went different ways"):
            other.lease(2 * PAGE)


@pytest.mark.parametrize("dead", [0, 1])
def test_a_rank_that_is_gone_is_an_error_for_the_others(
    meet: Meet, ledgers: tuple[Ledger, Ledger], dead: int
) -> None:
    found = meet(2)
    with engine(ledgers, found):
        found[dead].close()
        with pytest.raises(EngineError, match="of this engine has ended"):
            for _ in range(2):
                AgreedAccount(found[1 - dead]).pressed()


def test_ranks_with_different_kv_caches_are_refused() -> None:
    with pytest.raises(EngineError, match="KV caches of different shapes"):
        gathered(2, lambda number: b"%d" % number)


def test_a_rank_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "GATHER_S", 0.1)
    with pytest.raises(EngineError, match=r"2 ranks of this engine do not meet within 0\.1 s"):
        ranks.gather(0, 2, lambda mine: mine, SHAPE)


def decide(rank: Rank, seed: int) -> list[object]:
    """A page pool's life by dice: everything that it hands out and every command that leaves it."""
    account, clock, dice = AgreedAccount(rank), AgreedClock(rank), random.Random(seed)
    pool = PagePool(
        Blocks(2 * PAGES * PER_PAGE, PER_PAGE),
        account,
        PAGE,
        warm_low=1,
        warm_high=3,
        clock=clock,
        on_evict=lambda ids: None,
    )
    held: list[list[int]] = []
    seen: list[object] = []
    for _ in range(400):
        clock.turn()
        seen.append(pool.relieve())
        if held and dice.random() < 0.5:
            pool.blocks.free(held.pop(dice.randrange(len(held))), dice.random() < 0.5)
        count = dice.randrange(1, 3 * PER_PAGE)
        if not pool.closed and pool.ensure(count):
            account.set_demand(0)
            ids = pool.blocks.alloc(count)
            assert ids is not None
            held.append(ids)
            seen.append(tuple(ids))
        pool.settle(idle=not held)
        seen.append(pool.take_commands())
        pool.publish()
        pool.check()
    return seen


def disturb(account: Account, over: threading.Event) -> None:
    """A rival that takes and gives, at any moment."""
    dice = random.Random()
    held = 0
    while not over.wait(dice.random() * 0.0005):
        if held and dice.random() < 0.5:
            account.give_back(held * PAGE)
            held = 0
        elif account.lease((more := dice.randrange(1, 8)) * PAGE):
            held += more
        account.set_demand(dice.choice([0, 0, 6 * PAGE]))


@pytest.mark.parametrize("seed", range(5))
def test_pools_of_all_ranks_decide_alike_beside_a_rival(
    meet: Meet, ledgers: tuple[Ledger, Ledger], seed: int
) -> None:
    found, over = meet(3), threading.Event()
    with (
        engine(ledgers, found),
        ledgers[0].join("rival", "rival", PAGE) as rival,
        ThreadPoolExecutor(4) as threads,
    ):
        disturbing = threads.submit(disturb, rival, over)
        deciding = [threads.submit(decide, rank, seed) for rank in found]
        try:
            lives = [each.result(timeout=60) for each in deciding]
        finally:
            over.set()
        disturbing.result()
    assert lives[0] == lives[1] == lives[2]
    assert any(isinstance(each, tuple) for each in lives[0])
    assert any(isinstance(each, int) and each > 0 for each in lives[0]), "nothing was reclaimed"
