"""Page pools that share a device: what each gives, keeps and gets, on a real ledger."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from page_pools import PAGE, PER_PAGE, Instance

from kvcached.ledger import Ledger
from kvcached.pages import REST_S

PAGES = 20


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "ledger", "host:pages", PAGES * PAGE) as opened:
        yield opened


@pytest.fixture
def one(ledger: Ledger) -> Instance:
    return Instance(ledger, "one", pages=PAGES)


@pytest.fixture
def two(ledger: Ledger) -> Instance:
    return Instance(ledger, "two", pages=PAGES)


def fill(it: Instance, pages: int) -> list[int]:
    """So many whole pages in use, the first one apart; mapped."""
    ids = it.alloc(3 + pages * PER_PAGE)
    it.carry()
    it.pool.publish()
    return ids


def give(it: Instance) -> int:
    """What it gives when it is asked; unmapped. In pages."""
    given = it.pool.relieve()
    it.carry()
    it.pool.publish()
    return given // PAGE


def test_a_burst_leaves_a_busy_neighbour_its_share(one: Instance, two: Instance) -> None:
    held = fill(one, 18)
    one.blocks.free(held[2 * PER_PAGE + 3 :], cached=True)  # 2 pages and the first in use
    one.pool.publish()
    assert not two.pool.ensure(3 + 15 * PER_PAGE)
    assert give(one) == 9, "from 19 pages down to 10 of 20, although 16 are unused"
    assert give(one) == 0
    assert len(one.evicted) == one.pool.counters.evicted_blocks == 9 * PER_PAGE
    assert two.pool.ensure(3 + 9 * PER_PAGE)
    assert not two.pool.ensure(3 + 10 * PER_PAGE)
    assert give(one) == 0
    one.check()
    two.check()


def test_what_others_are_about_to_give_is_expected(one: Instance, two: Instance) -> None:
    held = fill(one, 18)
    assert not two.pool.ensure(3 + 4 * PER_PAGE)
    two.pool.publish()
    assert not two.pool.expects(), "all of it is in use"
    one.blocks.free(held[2 * PER_PAGE + 3 :], cached=True)
    one.pool.publish()
    assert two.pool.expects()
    assert not two.pool.ensure(3 + 15 * PER_PAGE)
    assert not two.pool.expects(), "more than its share"
    assert not two.pool.ensure(3 + 4 * PER_PAGE)
    assert give(one) > 0
    assert not two.pool.expects(), "it is there"
    assert two.pool.ensure(3 + 4 * PER_PAGE)


def test_an_idle_cache_goes_all_of_it(one: Instance, two: Instance) -> None:
    one.blocks.free(fill(one, 18), cached=True)
    one.pool.publish()
    assert not two.pool.ensure(3 + 18 * PER_PAGE)
    assert give(one) == 9, "it has just worked: its share is kept for a moment"
    assert not one.pool.rested() and give(one) == 0
    one.now_s += REST_S
    assert one.pool.rested() and give(one) == 9
    assert not one.pool.rested() and one.charged_pages == 1
    assert two.pool.ensure(3 + 18 * PER_PAGE)


def test_memory_in_use_above_the_share_comes_back_as_requests_end(
    one: Instance, two: Instance
) -> None:
    held = fill(one, 18)
    assert not one.pool.closed
    assert not two.pool.ensure(3 + 4 * PER_PAGE)
    assert give(one) == 0 and one.pool.closed
    one.blocks.free(held[-2 * PER_PAGE :])
    one.pool.publish()
    assert give(one) == 2 and one.pool.closed
    assert two.pool.ensure(3 + 2 * PER_PAGE)
    assert not two.pool.ensure(3 + 4 * PER_PAGE)
    one.blocks.free(held[3 : 3 + 5 * PER_PAGE])
    one.pool.publish()
    assert give(one) == 2, "what is wanted, although 5 are free"
    assert not one.pool.closed
    assert two.pool.ensure(3 + 4 * PER_PAGE)
    two.account.set_demand(0)
    assert one.blocks.empty_pages == 3 and give(one) == 0


def test_who_has_its_share_gets_nothing_while_another_waits_for_his(
    one: Instance, two: Instance
) -> None:
    held = fill(one, 15)
    two.alloc(3 + 2 * PER_PAGE)  # 1 page of the 20 is left, and then 2 more
    two.pool.publish()
    assert not two.pool.ensure(5 * PER_PAGE)
    one.blocks.free(held[-2 * PER_PAGE :])
    one.pool.give_up(2)
    one.carry()
    one.pool.publish()
    assert one.account.leasable() == 3 * PAGE
    assert not one.pool.ensure(PER_PAGE), "it is there, but not for this one"
    assert two.pool.ensure(3 * PER_PAGE)


def test_what_nobody_is_entitled_to_and_waits_for_is_for_anyone(
    one: Instance, two: Instance, ledger: Ledger
) -> None:
    ledger.set_limit("two", 3 * PAGE)
    two.alloc(3 + 2 * PER_PAGE)
    two.pool.publish()
    assert not two.pool.ensure(3 + 3 * PER_PAGE), "its limit"
    assert two.account.charge() == 3 * PAGE and one.account.others_demand() > 0
    fill(one, 16)
    assert one.charged_pages == 17


def test_a_lower_limit_takes_the_cache_and_closes(one: Instance, ledger: Ledger) -> None:
    held = fill(one, 12)
    one.blocks.free(held[3 : 3 + 4 * PER_PAGE], cached=True)
    one.pool.publish()
    assert give(one) == 0
    ledger.set_limit("one", 5 * PAGE)
    assert give(one) == 4 and one.pool.closed
    one.blocks.free(held[-8 * PER_PAGE :], cached=True)
    one.pool.publish()
    assert give(one) == 4 and not one.pool.closed
    assert one.charged_pages == 5


def test_a_guarantee_is_made_good_before_it_is_wanted(
    one: Instance, two: Instance, ledger: Ledger
) -> None:
    one.blocks.free(fill(one, 18), cached=True)
    one.pool.publish()
    ledger.set_guarantee("two", 6 * PAGE)
    assert give(one) == 5, "the page that two has is part of it"
    assert two.pool.ensure(3 + 5 * PER_PAGE)


def test_with_preemption_no_further_block_is_handed_out(ledger: Ledger, two: Instance) -> None:
    one = Instance(ledger, "one", pages=PAGES, preempt=1)
    held = fill(one, 18)
    one.blocks.free(held[-2:])
    assert one.blocks.available() == 2
    assert not two.pool.ensure(3 + 4 * PER_PAGE)
    one.pool.relieve()
    assert one.blocks.available() == 0 and one.blocks.alloc(1) is None
    assert not one.pool.ensure(1)
    one.blocks.free(held[-4 * PER_PAGE : -2])  # what the engine preempts
    assert one.blocks.available() == 4 * PER_PAGE - 2, "within the step others go on with it"
    one.pool.publish()
    assert give(one) == 4
    one.pool.relieve()
    assert not one.pool.closed and one.blocks.alloc(1) is None
    two.account.set_demand(0)
    one.pool.relieve()
    assert one.blocks.alloc(1) is None, "nothing is bounded, but every block is in use"
    one.blocks.free(held[-4 * PER_PAGE - 1 : -4 * PER_PAGE])
    assert one.blocks.alloc(1) is not None
    one.check()


def test_a_debt_that_nobody_waits_for_binds_no_more(ledger: Ledger, two: Instance) -> None:
    one = Instance(ledger, "one", pages=PAGES, preempt=1)
    held = fill(one, 17)
    one.blocks.free(held[-2:])
    assert not two.pool.ensure(3 + 4 * PER_PAGE)
    one.pool.relieve()
    assert one.blocks.available() == 0
    two.account.set_demand(0)
    assert one.pool.ensure(2) and one.charged_pages == 18, "its own blocks, no page more"
    assert one.blocks.alloc(2) is not None
    assert not two.pool.ensure(3 + 4 * PER_PAGE)
    one.pool.relieve()
    two.account.set_demand(0)
    assert one.pool.ensure(PER_PAGE), "a page more"
    assert one.blocks.alloc(PER_PAGE) is not None


def test_one_version_of_the_ledger_is_judged_once(
    one: Instance, two: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(one, 18)
    asked = []
    standings = one.account.standings
    monkeypatch.setattr(
        one.account, "standings", lambda *args: asked.append(args) or standings(*args)
    )
    for _ in range(5):
        one.pool.relieve()
    assert asked == [], "nobody waits"
    assert not two.pool.ensure(3 + 4 * PER_PAGE)
    for _ in range(5):
        one.pool.relieve()
        one.pool.publish()
    assert len(asked) == 1
    assert one.pool.closed, "and what it said still holds"
    two.account.set_demand(PAGE)
    one.pool.relieve()
    assert len(asked) == 2


def test_what_the_device_refuses_is_missing_from_everyone(one: Instance, two: Instance) -> None:
    one.blocks.free(fill(one, 12), cached=True)
    one.pool.publish()
    fill(two, 6)
    two.member.set_demand(3 * PAGE)  # leased and refused: a foreign program has it
    assert give(one) == 3
    two.member.set_demand(0)
    assert give(one) == 0


def test_the_demand_of_the_dead_keeps_nothing_from_the_living(
    one: Instance, ledger: Ledger
) -> None:
    child = os.fork()
    if child == 0:
        mine = Ledger.open(ledger.path.parent, "host:pages")
        account = mine.join("dead", "dead")
        account.set_demand(PAGES * PAGE)
        os._exit(0)
    os.waitpid(child, 0)
    assert one.account.others_demand() == PAGES * PAGE
    assert one.pool.ensure(3 + 15 * PER_PAGE), "15 pages is more than half"
    assert one.account.others_demand() == 0
