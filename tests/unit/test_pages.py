"""The page pool on the real block allocator and a real ledger: what it decides and charges."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from page_pools import PAGE, PER_PAGE, Instance

from kvcached.commands import Commands
from kvcached.errors import ConfigError, KvcachedError
from kvcached.ledger import Ledger


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "ledger", "host:pages", 10 * PAGE) as opened:
        yield opened


@pytest.fixture
def one(ledger: Ledger) -> Instance:
    return Instance(ledger, "one")


def test_watermarks_must_be_in_order(ledger: Ledger) -> None:
    with pytest.raises(ConfigError, match="low=3 must be between 0 and high=2"):
        Instance(ledger, "one", warm_low=3)


def test_ensure_leases_whole_pages_and_maps_them_later(one: Instance) -> None:
    assert one.pool.ensure(3)
    assert not one.pool.has_commands() and one.pool.take_commands() is None
    assert one.pool.ensure(8)  # 3 are there; 5 more are 2 pages
    one.check()
    assert one.charged_pages == 3 and one.account.core.charge() == 3 * PAGE
    assert one.blocks.alloc(3 + PER_PAGE) is not None
    assert one.carry() == Commands(unmap=(), map=(1,), ahead=(2,))
    assert one.member.held() == 3 * PAGE
    assert (one.pool.counters.mapped, one.pool.counters.mapped_ahead) == (2, 1)


def test_a_refused_ensure_changes_nothing_but_the_demand(ledger: Ledger, one: Instance) -> None:
    other = Instance(ledger, "other")
    assert not one.pool.ensure(3 + 9 * PER_PAGE)
    assert one.pool.counters.refused == 1
    assert (one.blocks.present_pages, one.pool.has_commands()) == (1, False)
    assert other.account.others_demand() == 9 * PAGE
    one.check()
    assert one.pool.ensure(3 + 8 * PER_PAGE)


def test_what_can_never_be_present_makes_no_demand(one: Instance) -> None:
    assert not one.pool.ensure(16 * PER_PAGE)  # block 0 is in use
    assert one.pool.counters.refused == 0
    assert one.account.others_demand() == 0
    one.check()


def test_pages_wanted_again_before_they_left_are_kept(one: Instance) -> None:
    held = one.alloc(3 + 4 * PER_PAGE)
    one.carry()
    one.blocks.free(held)
    one.pool.settle(idle=False)  # pages 4 and 3 are above the high watermark
    assert one.blocks.present_pages == 3
    one.check()
    assert one.charged_pages == 5, "what is still mapped is still charged"
    held = one.alloc(3 + 4 * PER_PAGE)
    assert one.pool.counters.cancelled == 2
    assert not one.pool.has_commands()
    one.check()
    assert one.charged_pages == 5


def test_pages_dropped_before_they_were_mapped_are_never_mapped(one: Instance) -> None:
    held = one.alloc(3 + 4 * PER_PAGE)
    one.blocks.free(held)
    one.pool.settle(idle=True)
    assert one.pool.counters.cancelled == 3
    assert one.carry() == Commands(unmap=(), map=(), ahead=(1,))
    assert one.charged_pages == 2
    one.check()


def test_settle_keeps_the_high_mark_when_busy_and_the_low_one_when_idle(one: Instance) -> None:
    held = one.alloc(3 + 5 * PER_PAGE)
    one.carry()
    one.blocks.free(held)
    one.pool.settle(idle=False)
    assert one.blocks.empty_pages == 2
    one.pool.settle(idle=True)
    assert one.blocks.empty_pages == 1
    assert one.carry().unmap == (5, 4, 3, 2)
    one.check()
    assert one.charged_pages == 2


def test_a_bounded_cache_forgets_its_oldest_blocks(ledger: Ledger) -> None:
    one = Instance(ledger, "one", max_cached_blocks=2)
    held = one.alloc(3 + PER_PAGE)
    one.blocks.free(held, cached=True)
    one.pool.settle(idle=True)
    assert one.evicted == held[:-2]
    assert one.blocks.cached_blocks == 2
    one.check()


def test_growth_is_preferred_to_eviction_while_nobody_waits(ledger: Ledger, one: Instance) -> None:
    held = one.alloc(3 + PER_PAGE)
    one.blocks.free(held, cached=True)
    one.pool.prefer_growth(PER_PAGE)
    assert one.blocks.free_blocks == PER_PAGE and one.blocks.cached_blocks == len(held)
    one.check()
    other = Instance(ledger, "other")
    other.account.set_demand(PAGE)
    one.pool.prefer_growth(2 * PER_PAGE)
    assert one.blocks.free_blocks == PER_PAGE
    other.account.set_demand(0)
    one.pool.prefer_growth(40 * PER_PAGE)  # as far as leases go, and no demand
    assert one.charged_pages == 9
    assert other.account.others_demand() == 0
    one.check()


def test_relieve_gives_warm_pages_then_the_oldest_cached_ones(
    ledger: Ledger, one: Instance
) -> None:
    other = Instance(ledger, "other")
    held = one.alloc(3 + 7 * PER_PAGE)  # pages 1 to 7, so that 1 is left to lease
    one.carry()
    pages = {page: [i for i in held if i // PER_PAGE == page] for page in range(8)}
    one.blocks.free(pages[7])
    one.blocks.free(pages[5], cached=True)
    one.blocks.free(pages[2], cached=True)
    assert one.pool.relieve() == 0, "nobody wants anything"
    assert not other.pool.ensure(3 + 3 * PER_PAGE)
    assert one.pool.relieve() == 2 * PAGE  # 1 of the 3 is free
    assert one.evicted == sorted(pages[5])
    assert one.carry() == Commands(unmap=(7, 5), map=())
    assert one.pool.relieve() == 0
    assert other.pool.ensure(3 + 3 * PER_PAGE)
    account = ledger.snapshot().account("one")
    assert account is not None and account.reclaimed == 2 * PAGE
    one.check()


def test_relieve_counts_what_is_already_on_its_way(ledger: Ledger, one: Instance) -> None:
    other = Instance(ledger, "other")
    one.blocks.free(one.alloc(3 + 8 * PER_PAGE), cached=True)
    one.carry()
    assert not other.pool.ensure(3 + PER_PAGE)
    assert one.pool.relieve() == PAGE
    assert one.pool.relieve() == 0, "its unmap has not left yet"
    one.check()


def test_a_demand_leaves_out_pages_that_are_still_here(ledger: Ledger, one: Instance) -> None:
    other = Instance(ledger, "other")
    held = one.alloc(3 + 6 * PER_PAGE)
    one.carry()
    one.blocks.free(held[3:])
    one.pool.settle(idle=True)
    assert len(one.pool._to_unmap) == 5
    other.alloc(3 + 2 * PER_PAGE)
    assert not one.pool.ensure(9 * PER_PAGE)
    assert other.account.others_demand() == 3 * PAGE, "of 8, 5 wait to be unmapped"
    one.check()


def test_publish_says_what_pages_are_used_for(ledger: Ledger, one: Instance) -> None:
    held = one.alloc(3 + 3 * PER_PAGE)
    one.blocks.free([i for i in held if i // PER_PAGE == 1], cached=True)
    one.blocks.free([i for i in held if i // PER_PAGE == 3])
    one.pool.publish()
    account = ledger.snapshot().account("one")
    assert account is not None
    assert (account.in_use, account.cached, account.warm) == (2 * PAGE, PAGE, PAGE)


def test_check_names_pages_that_do_not_fit(one: Instance) -> None:
    one.alloc(3 + PER_PAGE)
    one.pool._to_map[9] = None
    with pytest.raises(KvcachedError, match=r"to map but absent \[9\]"):
        one.pool.check()


@pytest.mark.parametrize("seed", range(8))
def test_random_programs_of_two_pools_add_up(ledger: Ledger, seed: int) -> None:
    random_ = random.Random(seed)
    instances = [Instance(ledger, name, pages=14) for name in ("one", "two")]
    held: list[list[list[int]]] = [[], []]
    under_way: list[list[Commands]] = [[], []]
    for _ in range(1500):
        which = random_.randrange(2)
        it, mine = instances[which], held[which]
        action = random_.randrange(8)
        if action <= 1:
            count = random_.randint(1, 20)
            it.pool.prefer_growth(count)
            if it.pool.ensure(count):
                it.account.set_demand(0)
                ids = it.blocks.alloc(count)
                assert ids is not None
                assert all(it.blocks.is_present(i // PER_PAGE) for i in ids)
                mine.append(ids)
        elif action <= 3 and mine:
            it.blocks.free(mine.pop(random_.randrange(len(mine))), cached=random_.random() < 0.5)
        elif action == 4:
            it.pool.settle(idle=not mine)
        elif action == 5:
            it.pool.relieve()
        elif action == 6:
            it.pool.give_up(random_.randint(0, 3))
        commands = it.take() if random_.random() < 0.4 else None
        if commands is not None:
            under_way[which].append(commands)
        while under_way[which] and random_.random() < 0.6:
            it.apply(under_way[which].pop(0))
        for number, instance in enumerate(instances):
            instance.check(sum(len(c.unmap) for c in under_way[number]))
        assert sum(instance.charged_pages for instance in instances) <= 10
    for number, instance in enumerate(instances):
        for commands in under_way[number]:
            instance.apply(commands)
        for ids in held[number]:
            instance.blocks.free(ids)
        instance.blocks.uncache_all()
        instance.pool.settle(idle=True)
        instance.carry()
        assert instance.charged_pages <= 2
        assert instance.member.held() == len(instance.mapped) * PAGE


def test_unmaps_may_stay_and_be_kept_while_maps_leave(one: Instance) -> None:
    ids = one.alloc(3 + PER_PAGE)  # the rest of page 0, and page 1
    one.carry()
    one.blocks.free(ids)
    one.pool.settle(idle=True)
    one.pool.give_up(1)
    assert one.pool.has_unmaps()
    assert one.pool.take_commands(unmap=False) is None
    more = one.alloc(3 + 2 * PER_PAGE)
    commands = one.pool.take_commands(unmap=False)
    assert commands is not None and commands == Commands(unmap=(), map=(2,))
    assert not one.pool.has_unmaps(), "page 1, which was still mapped, is in use again"
    one.apply(commands)
    one.blocks.free(more)
    one.pool.give_up(2)
    assert one.carry().unmap == (2, 1)
    one.check()
