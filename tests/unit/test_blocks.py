"""The block allocator against a simple model, and its promises one by one."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvcached.errors import InvalidArgumentError
from kvcached.vmm_ops import BlockQueue, Blocks


def grown(num_blocks: int = 64, blocks_per_page: int = 4, pages: int = 15) -> Blocks:
    blocks = Blocks(num_blocks, blocks_per_page)
    blocks.grow(pages)
    return blocks


def test_starts_with_the_pinned_page_and_block_0_in_use() -> None:
    blocks = Blocks(64, 4)
    assert (blocks.present_pages, blocks.used_blocks, blocks.available()) == (1, 1, 3)


def test_shortage_is_none_and_changes_nothing() -> None:
    blocks = Blocks(64, 4)
    assert blocks.alloc(4) is None
    assert blocks.available() == 3
    assert sorted(blocks.alloc(3)) == [1, 2, 3]


@pytest.mark.parametrize("count", [0, -1, 65, 1 << 40])
def test_bad_count_names_it(count: int) -> None:
    blocks = grown()
    with pytest.raises(InvalidArgumentError, match=str(count)):
        blocks.alloc(count)
    blocks.check()


@pytest.mark.parametrize(
    ("ids", "named"),
    [([5, 5], "5"), ([5, 99], "99"), ([5, -1], "-1"), ([5, 6], "6"), ([1 << 40], str(1 << 40))],
)
def test_bad_free_names_the_block_and_changes_nothing(ids: list[int], named: str) -> None:
    blocks = grown()
    taken = blocks.alloc(5)  # 1, 2, 3 of the pinned page, then 4 and 5
    assert 5 in taken and 6 not in taken
    with pytest.raises(InvalidArgumentError, match=f"block {named}"):
        blocks.free(ids)
    blocks.check()
    assert blocks.used_blocks == 6
    blocks.free(taken)


def test_free_of_a_block_whose_page_is_not_mapped() -> None:
    blocks = Blocks(64, 4)
    with pytest.raises(InvalidArgumentError, match=r"block 63.*not mapped"):
        blocks.free([63])


def test_fills_partly_used_pages_first_then_low_pages() -> None:
    blocks = grown()
    held = blocks.alloc(19)  # the rest of page 0 and pages 1 to 4
    blocks.free([held[6], held[10]])
    blocks.free([i for i in held if 16 <= i < 20])
    assert blocks.empty_pages == 12  # 5 to 15 and now 4
    again = blocks.alloc(2)
    assert sorted(i // 4 for i in again) == sorted({held[6] // 4, held[10] // 4})
    assert blocks.alloc(1)[0] // 4 == 4


def holes(per_page: int, rooms: list[int]) -> Blocks:
    """All in use but the first blocks of as many pages, from page 1 on."""
    blocks = Blocks((len(rooms) + 1) * per_page, per_page)
    blocks.grow(len(rooms))
    assert blocks.alloc(blocks.num_blocks - 1) is not None
    for page, room in enumerate(rooms, 1):
        blocks.free(range(per_page * page, per_page * page + room))
    return blocks


def pages(blocks: Blocks, count: int) -> list[int]:
    """The pages of so many blocks; nothing stays handed out."""
    ids = blocks.alloc(count)
    assert ids is not None
    blocks.check()
    blocks.free(ids)
    blocks.check()
    return [block // blocks.blocks_per_page for block in ids]


def test_what_comes_together_lies_together() -> None:
    blocks = holes(8, [3, 2, 5, 7, 3, 3, 6, 3, 1, 6])
    assert pages(blocks, 1) == [9], "the fullest page that is not full"
    assert pages(blocks, 3) == [1] * 3, "least room beyond what is wanted, and the lowest of them"
    assert pages(blocks, 4) == [3] * 4
    assert pages(blocks, 7) == [4] * 7
    assert pages(blocks, 9) == [4] * 7 + [2] * 2, "the emptiest, and for the rest what fits closely"


def test_scraps_are_left_to_who_wants_little() -> None:
    rooms = [1, 2, 3, *[1] * 12]
    blocks = holes(20, [*rooms, 20, 20])
    assert blocks.empty_pages == 2
    assert pages(blocks, 15) == [3] * 3 + [16] * 12, "room for a fifth of it is worth while"
    assert pages(blocks, 16) == [16] * 16, "less is not, where there is an empty page"
    assert pages(blocks, 42) == [16] * 20 + [17] * 20 + [2] * 2
    assert pages(holes(20, rooms), 16)[:5] == [3, 3, 3, 2, 2], "without one they have to do"


def test_few_holes_are_filled_from_the_lowest_page_on() -> None:
    blocks = holes(8, [3, 2, 5, 7, 3, 3, 6, 3])
    assert pages(blocks, 1) == [1]
    assert pages(blocks, 9) == [1] * 3 + [2] * 2 + [3] * 4


@pytest.mark.parametrize("per_page", [64, 65, 200, 1000])
def test_large_pages_are_filled_as_closely_as_their_buckets_are_fine(per_page: int) -> None:
    half = per_page // 2
    blocks = holes(per_page, [half, 1, *[per_page - 1] * 8])
    assert set(pages(blocks, half)) == {1}
    assert pages(blocks, 1) == [2]
    assert set(pages(blocks, per_page - 1)) == {3}


def test_whole_pages_come_free_and_go_highest_first() -> None:
    blocks = grown()
    held = blocks.alloc(63)
    blocks.free([i for i in held if i >= 32])
    assert blocks.shrink(3) == [15, 14, 13]
    assert blocks.available() == (8 - 3) * 4
    assert blocks.grow(1) == [13]
    blocks.check()


def test_the_pinned_page_is_never_given_up() -> None:
    blocks = Blocks(64, 4, reserve_block0=False)
    assert blocks.shrink(16) == []
    blocks.free(blocks.alloc(2), cached=True)
    assert blocks.reclaim(16) == ([], [])
    assert blocks.present_pages == 1


def test_cached_blocks_are_evicted_oldest_first_and_only_when_nothing_is_free() -> None:
    blocks = grown(16, 4, 3)
    held = blocks.alloc(15)
    blocks.free([held[9], held[2], held[5]], cached=True)
    blocks.free([held[0]])
    assert blocks.alloc(1) == [held[0]]
    assert blocks.alloc(2) == [held[9], held[2]]
    blocks.touch([held[5]])
    assert blocks.alloc(1) is None


def test_reclaim_takes_whole_unused_pages_longest_unused_first() -> None:
    blocks = grown()
    held = blocks.alloc(15)
    pages = {page: [i for i in held if i // 4 == page] for page in range(4)}
    blocks.free(pages[3], cached=True)
    blocks.free(pages[1], cached=True)
    blocks.free(pages[2][:3], cached=True)  # one block of page 2 stays in use
    assert blocks.idle_pages == 2
    got, evicted = blocks.reclaim(9)
    assert got == [3, 1]
    assert sorted(evicted) == sorted(pages[3] + pages[1])
    assert blocks.cached_blocks == 3
    blocks.check()


def test_a_bound_hands_out_no_more_and_takes_nothing_away() -> None:
    blocks = grown()
    held = blocks.alloc(8)  # 9 in use with block 0
    blocks.set_bound(9)
    assert blocks.available() == 0 and blocks.alloc(1) is None
    blocks.free(held[:3], cached=True)
    assert blocks.available() == 3 and blocks.alloc(4) is None
    blocks.set_bound(4)
    assert blocks.available() == 0 and blocks.used_blocks == 6
    blocks.touch(held[:1])  # what is found in the cache need not be handed out
    blocks.set_bound(None)
    assert blocks.available() == 64 - 7
    blocks.check()


def test_hits_misses_and_evictions_are_counted() -> None:
    blocks = Blocks(16, 4)
    blocks.grow(3)
    held = blocks.alloc(15)
    blocks.free(held[:6], cached=True)
    blocks.touch(held[2:4])
    blocks.alloc(3)  # nothing is free: three of the cached ones are lost
    assert (blocks.hits, blocks.misses, blocks.evictions) == (2, 18, 3)
    blocks.uncache(1)
    assert blocks.evictions == 4
    blocks.free(held[6:8], cached=True)
    blocks.uncache_all()
    assert blocks.evictions == 4, "somebody asked for an empty cache"


@pytest.mark.parametrize(
    ("num_blocks", "per_page"), [(0, 1), (-5, 1), (8, 0), (8, 9), (1 << 40, 4)]
)
def test_bad_geometry(num_blocks: int, per_page: int) -> None:
    with pytest.raises(InvalidArgumentError):
        Blocks(num_blocks, per_page)


@dataclasses.dataclass(slots=True)
class EngineBlock:
    """What an engine's own block object looks like to the queue."""

    block_id: int
    hash: object = None


def test_queue_hands_out_the_engines_own_objects() -> None:
    blocks = grown(16, 4, 3)
    objects = [EngineBlock(i) for i in range(16)]
    queue = BlockQueue(blocks, objects, "hash")
    taken = queue.popleft_n(5)
    assert all(block is objects[block.block_id] for block in taken)
    taken[0].hash = "prefix"
    queue.append_n(taken)
    assert (blocks.cached_blocks, blocks.free_blocks) == (1, 14)
    queue.remove(taken[0])
    assert queue.num_free_blocks == 14
    assert len(queue.get_all_free_blocks()) == 14
    with pytest.raises(ValueError, match="15 blocks wanted, 14 available"):
        queue.popleft_n(15)
    with pytest.raises(InvalidArgumentError, match="block 2: it is free"):
        queue.append(objects[2])


class BlocksMachine(RuleBasedStateMachine):
    """Random programs against a model of sets; the integrity check after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = Blocks(41, 3)  # the last page is short
        self.used: list[int] = []
        self.cached: list[int] = []
        self.pages = {0}

    @rule(count=st.integers(1, 12))
    def alloc(self, count: int) -> None:
        room = sum(self.size(p) for p in self.pages) - 1 - len(self.used)
        ids = self.blocks.alloc(count)
        if count > room:
            assert ids is None
            return
        assert ids is not None and len(set(ids)) == count
        free = room - len(self.cached)
        evicted = self.cached[: max(0, count - free)]
        assert ids[count - len(evicted) :] == evicted
        self.cached = self.cached[len(evicted) :]
        assert not set(ids) & (set(self.used) | set(self.cached) | {0})
        assert all(i // 3 in self.pages for i in ids)
        self.used += ids

    @precondition(lambda self: self.used)
    @rule(data=st.data(), cached=st.booleans())
    def free(self, data: st.DataObject, cached: bool) -> None:
        ids = data.draw(st.lists(st.sampled_from(self.used), unique=True, min_size=1))
        self.blocks.free(ids, cached)
        self.used = [i for i in self.used if i not in ids]
        if cached:
            self.cached += ids

    @precondition(lambda self: self.cached)
    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.sampled_from(self.cached), unique=True, min_size=1))
        self.blocks.touch(ids)
        self.cached = [i for i in self.cached if i not in ids]
        self.used += ids

    @rule(count=st.integers(0, 5))
    def grow(self, count: int) -> None:
        absent = [p for p in range(14) if p not in self.pages]
        assert self.blocks.grow(count) == absent[:count]
        self.pages |= set(absent[:count])

    @rule(count=st.integers(0, 5))
    def shrink(self, count: int) -> None:
        busy = {i // 3 for i in self.used + self.cached} | {0}
        empty = sorted(self.pages - busy, reverse=True)[:count]
        assert self.blocks.shrink(count) == empty
        self.pages -= set(empty)

    @rule(count=st.integers(0, 5))
    def reclaim(self, count: int) -> None:
        pages, evicted = self.blocks.reclaim(count)
        assert len(pages) <= count
        assert not {i // 3 for i in self.used} & set(pages)
        assert set(evicted) == {i for i in self.cached if i // 3 in pages}
        self.cached = [i for i in self.cached if i not in evicted]
        self.pages -= set(pages)

    @rule(count=st.integers(0, 5))
    def uncache(self, count: int) -> None:
        assert self.blocks.uncache(count) == self.cached[:count]
        self.cached = self.cached[count:]

    @rule()
    def uncache_all(self) -> None:
        self.blocks.uncache_all()
        self.cached = []

    @invariant()
    def adds_up(self) -> None:
        self.blocks.check()
        assert self.blocks.used_blocks == len(self.used) + 1
        assert self.blocks.cached_blocks == len(self.cached)
        assert self.blocks.present_pages == len(self.pages)

    @staticmethod
    def size(page: int) -> int:
        return 2 if page == 13 else 3


TestBlocksMachine = BlocksMachine.TestCase
TestBlocksMachine.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
