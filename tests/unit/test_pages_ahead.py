"""Pages mapped ahead of need: how many, when, and how the step that uses them says so."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_pages import PAGE, PER_PAGE, Instance

from kvcached.commands import Commands
from kvcached.ledger import Ledger
from kvcached.traffic import Traffic

CAPACITY_PAGES = 40


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "ledger", "host:ahead", CAPACITY_PAGES * PAGE) as opened:
        yield opened


@pytest.fixture
def one(ledger: Ledger) -> Instance:
    return Instance(ledger, "one", pages=64, warm_low=1, warm_high=4)


def step(one: Instance, pages: int) -> Commands:
    """A step of a busy engine that fills so many pages more."""
    one.alloc(pages * PER_PAGE)
    one.pool.settle(idle=False)
    return one.carry()


def test_a_burst_is_followed_at_once_and_forgotten_slowly() -> None:
    traffic = Traffic(3)

    def observe(pages_in_use: int) -> int:
        traffic.observe(pages_in_use)
        return traffic.worth_warming(100)

    assert observe(3) == 0
    assert observe(8) == 10
    wanted = [observe(8) for _ in range(14)]
    assert wanted == sorted(wanted, reverse=True) and wanted[-1] == 5
    assert [observe(8) for _ in range(80)][-1] == 0
    assert observe(18) == 20
    assert traffic.worth_warming(4) == 4


def test_what_is_about_to_come_free_is_not_mapped_as_well() -> None:
    traffic = Traffic(0)
    for pages_in_use in (2, 0, 2, 0, 2):
        traffic.observe(pages_in_use)
    assert traffic.worth_warming(8) == 4
    assert traffic.worth_warming(4) == 2
    traffic.observe(0)
    assert traffic.worth_warming(1) < 0


def test_warm_pages_follow_the_arrivals_between_the_marks(one: Instance) -> None:
    one.alloc(3)
    one.pool.settle(idle=False)
    assert one.carry() == Commands(unmap=(), map=(), ahead=(1,)), "the low mark"
    assert step(one, 1) == Commands(unmap=(), map=(1,), ahead=(2, 3)), "two steps of one page"
    assert step(one, 1) == Commands(unmap=(), map=(2,), ahead=(4,))
    commands = step(one, 3)  # a page more than is there
    assert commands == Commands(unmap=(), map=(3, 4, 5), ahead=(6, 7, 8, 9)), "the high mark"
    one.check()
    assert one.charged_pages == 10
    assert one.pool.counters.mapped_ahead == 8


def test_what_is_known_to_come_is_mapped_above_the_high_mark(one: Instance) -> None:
    one.alloc(3)
    one.pool.settle(idle=False, coming=9 * PER_PAGE - 1)
    assert one.carry().ahead == tuple(range(1, 10))
    one.pool.settle(idle=False, coming=9 * PER_PAGE)
    assert one.carry() == Commands((), ()), "it is there"
    one.alloc(7 * PER_PAGE)
    one.pool.settle(idle=False)
    assert len(one.carry().map) == 7, "the step waits for none of them: they are mapped"
    one.pool.settle(idle=True, coming=9 * PER_PAGE)
    one.carry()
    assert one.blocks.empty_pages == 1, "an idle engine has nothing in line"
    one.check()


def test_pages_stay_for_prompts_in_line_and_none_are_mapped_for_them(one: Instance) -> None:
    """All requests of a batch end together, and the next batch has not begun."""
    held = one.alloc(12 * PER_PAGE - 1)
    one.pool.settle(idle=False)
    one.carry()
    one.blocks.free(held)
    one.pool.settle(idle=False, coming=6 * PER_PAGE, in_line=9 * PER_PAGE)
    assert one.carry().ahead == () and one.blocks.empty_pages == 9
    one.pool.settle(idle=False, coming=6 * PER_PAGE, in_line=12 * PER_PAGE)
    assert one.carry() == Commands((), ()), "for the next step there is enough"
    one.pool.settle(idle=True, in_line=9 * PER_PAGE)
    one.carry()
    assert one.blocks.empty_pages == 1
    one.check()


def test_between_steps_pages_are_mapped_for_what_arrives(ledger: Ledger) -> None:
    one = Instance(ledger, "one", pages=64, warm_low=1, warm_high=4)
    other = Instance(ledger, "other", pages=64)
    one.pool.foresee(6 * PER_PAGE)
    assert one.carry() == Commands(unmap=(), map=(), ahead=(1, 2, 3, 4, 5, 6))
    one.pool.foresee(6 * PER_PAGE)
    assert one.carry() == Commands((), ()), "they are there"
    one.alloc(3 + 5 * PER_PAGE)
    assert one.carry().map == (1, 2, 3, 4, 5), "a step names those it uses"
    other.account.set_demand(PAGE)
    one.pool.foresee(9 * PER_PAGE)
    assert one.carry() == Commands((), ()), "others wait"
    one.check()
    bare = Instance(ledger, "bare", pages=64, warm_low=0, warm_high=0)
    bare.pool.foresee(9 * PER_PAGE)
    assert bare.carry() == Commands((), ())


def test_what_is_known_to_come_takes_nothing_from_who_waits(ledger: Ledger) -> None:
    one = Instance(ledger, "one", pages=64, warm_low=1, warm_high=4)
    other = Instance(ledger, "other", pages=64)
    one.alloc(3)
    other.account.set_demand(PAGE)
    one.pool.settle(idle=False, coming=9 * PER_PAGE)
    assert one.carry() == Commands((), ())


def test_a_high_mark_of_zero_maps_nothing_ahead(ledger: Ledger) -> None:
    one = Instance(ledger, "one", pages=64, warm_low=0, warm_high=0)
    one.alloc(3)
    one.pool.settle(idle=False, coming=9 * PER_PAGE)
    assert one.carry() == Commands((), ())


def test_an_idle_engine_falls_to_the_low_mark_and_a_new_one_maps_nothing(one: Instance) -> None:
    for _ in range(3):
        one.pool.settle(idle=True)
        assert one.carry() == Commands((), ())
    held = one.alloc(3 + 6 * PER_PAGE)
    one.pool.settle(idle=False)
    one.carry()
    assert one.blocks.empty_pages == 4
    one.blocks.free(held)
    one.pool.settle(idle=True)
    one.carry()
    assert one.charged_pages == 2 and one.mapped == {0, 1}
    one.pool.settle(idle=True)
    assert one.carry() == Commands((), ())


def test_a_steady_engine_maps_and_unmaps_nothing(one: Instance) -> None:
    """Pages come into use and others go out of it, in each of many steps."""
    for pages in (1, 2, 3, 5):
        running = [one.alloc(PER_PAGE * pages) for _ in range(4)]
        for number in range(120):
            running.append(one.alloc(PER_PAGE * pages))
            one.pool.settle(idle=False)
            commands = one.carry()
            one.blocks.free(running.pop(0))
            one.pool.settle(idle=False)
            if number > 60:
                assert commands == Commands((), ()), (pages, number)
        for ids in running:
            one.blocks.free(ids)


@pytest.mark.parametrize("seed", range(3))
def test_few_steps_wait_and_few_pages_come_in_vain(ledger: Ledger, seed: int) -> None:
    """Random requests of a page or two that grow and end. A step waits for a page that it needs
    and that was not mapped ahead; a page came in vain if it leaves unused while others run.
    """
    random_ = random.Random(seed)
    one = Instance(ledger, "one", pages=64, warm_low=1, warm_high=4)
    running: list[list[int]] = []
    steps, waits, in_vain = 1000, 0, 0
    for _ in range(steps):
        if len(running) < 16 and random_.random() < 0.1:
            running.append(one.alloc(random_.randint(1, 2 * PER_PAGE)))
        for ids in running:
            if random_.random() < 0.02:
                ids += one.alloc(1)
        one.pool.settle(idle=not running)
        mapped, unused = set(one.mapped), set(one.unused)
        commands = one.carry()
        waits += not mapped.issuperset(commands.map)
        in_vain += len(unused & set(commands.unmap)) if running else 0
        assert one.blocks.empty_pages <= (4 if running else 1)
        for ids in [ids for ids in running if random_.random() < 0.01]:
            running.remove(ids)
            one.blocks.free(ids)
        one.pool.settle(idle=not running)
        one.check()
    assert one.pool.counters.mapped > 20
    assert waits <= one.pool.counters.mapped // 5
    assert in_vain <= steps // 20


def test_nothing_is_mapped_ahead_while_others_wait(ledger: Ledger, one: Instance) -> None:
    other = Instance(ledger, "other")
    other.account.set_demand(PAGE)
    assert step(one, 2) == Commands(unmap=(), map=(1, 2))
    other.account.set_demand(0)
    assert len(step(one, 1).ahead) == 4


def test_what_others_took_back_is_not_mapped_at_once(ledger: Ledger, one: Instance) -> None:
    other = Instance(ledger, "other", pages=64)
    assert len(step(one, 2).ahead) == 4
    assert not other.pool.ensure(36 * PER_PAGE)
    assert one.pool.relieve() > 0
    other.account.set_demand(0)
    one.pool.settle(idle=False)
    assert one.carry().ahead == ()


def test_nothing_ahead_raises_a_demand_or_a_refusal(ledger: Ledger, one: Instance) -> None:
    other = Instance(ledger, "other")
    one.alloc(3 + (CAPACITY_PAGES - 4) * PER_PAGE)  # two are left
    one.pool.settle(idle=False)
    commands = one.carry()
    assert len(commands.ahead) == 2
    one.pool.settle(idle=False)
    assert one.carry() == Commands((), ())
    account = ledger.snapshot().account("one")
    assert account is not None and account.refused == 0
    assert one.pool.counters.refused == 0
    assert other.account.others_demand() == 0
    one.check()


def test_a_page_is_needed_by_the_first_step_that_uses_it(one: Instance) -> None:
    one.alloc(3)
    one.pool.settle(idle=False)
    assert one.carry().ahead == (1,)
    (block,) = one.alloc(1)
    assert one.take() == Commands(unmap=(), map=(1,))
    assert one.take() is None, "it is said once"
    one.blocks.free([block], cached=True)
    one.blocks.touch([block])
    assert one.take() is None


def test_a_page_that_is_kept_is_still_one_that_was_sent_ahead(one: Instance) -> None:
    """The device may have refused it: dropping and keeping it says nothing about that."""
    one.alloc(3)
    one.pool.settle(idle=False)
    assert one.carry().ahead == (1,)
    assert one.pool.give_up(1) == 1
    one.alloc(1)  # kept: its unmap has not left
    assert one.pool.counters.cancelled == 1
    assert one.carry() == Commands(unmap=(), map=(1,))
    one.check()


def test_a_page_that_left_is_forgotten(one: Instance) -> None:
    one.alloc(3)
    one.pool.settle(idle=False)
    one.carry()
    assert one.pool.give_up(1) == 1
    assert one.carry() == Commands(unmap=(1,), map=())
    one.alloc(1)
    assert one.carry() == Commands(unmap=(), map=(1,))
    assert one.take() is None
    one.check()
