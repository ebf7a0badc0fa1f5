"""Layouts: no two blocks share a byte, and every byte lies in its block's page."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcached.errors import InvalidArgumentError
from kvcached.layout import (
    CUDA_LIMITS,
    HOST_LIMITS,
    BlockId,
    BlockLayout,
    PageId,
    PageLimits,
    Region,
    choose_padded_page,
    choose_page,
    max_arena_mappings,
)
from kvcached.units import KIB, MIB, ceil_div

GRANULARITY = 64  # small, so that properties are checked byte by byte


@st.composite
def layouts(draw: st.DrawFn) -> BlockLayout:
    sizes = draw(st.lists(st.integers(1, 96), min_size=1, max_size=5))
    blocks = draw(st.integers(1, 40))
    step = math.lcm(*(GRANULARITY // math.gcd(GRANULARITY, size) for size in sizes))
    per_page = step * draw(st.integers(1, 3))
    if len(sizes) == 1 and draw(st.booleans()):
        inner = draw(st.integers(1, sizes[0]))
        return BlockLayout.block_outermost(blocks, inner, per_page, GRANULARITY, sizes[0])
    return BlockLayout.layer_outermost(blocks, sizes, per_page, GRANULARITY)


@given(layouts())
def test_blocks_do_not_overlap_and_lie_in_their_page(layout: BlockLayout) -> None:
    owner: dict[int, tuple[int, int]] = {}
    for block in map(BlockId, range(layout.num_blocks)):
        page = layout.page_of(block)
        for region in range(len(layout.regions)):
            covered = layout.page_byte_range(page, region)
            for byte in layout.byte_range(block, region):
                assert byte not in owner, f"{byte} belongs to {owner[byte]} and to {block}"
                owner[byte] = (block, region)
                assert byte in covered
    assert max(owner) < layout.size_bytes


@given(layouts())
def test_pages_partition_the_blocks(layout: BlockLayout) -> None:
    blocks = [block for page in range(layout.num_pages) for block in layout.blocks_of(PageId(page))]
    assert blocks == list(range(layout.num_blocks))
    for block in blocks:
        assert block in layout.blocks_of(layout.page_of(block))


@given(layouts())
def test_regions_fit_an_arena(layout: BlockLayout) -> None:
    taken: set[int] = set()
    for index, (offset, chunk) in enumerate(layout.arena_regions()):
        assert offset % GRANULARITY == 0
        assert chunk % GRANULARITY == 0
        for page in map(PageId, range(layout.num_pages)):
            covered = layout.page_byte_range(page, index)
            assert covered == range(offset + page * chunk, offset + (page + 1) * chunk)
            assert taken.isdisjoint(covered)
            taken.update(covered)
    assert layout.page_bytes * layout.num_pages == len(taken)
    assert max(taken) < layout.size_bytes


def test_layer_outermost_with_an_engines_own_offsets() -> None:
    """One int8 buffer, layer l of block b at offset + l*layer_stride + b*block_stride."""
    layers, blocks, size = 3, 8, 4 * KIB
    layer_stride = blocks * size
    regions = tuple(Region(layer * layer_stride, size, size) for layer in range(layers))
    layout = BlockLayout(blocks, 2, 8 * KIB, regions)
    assert layout == BlockLayout.layer_outermost(blocks, [size] * layers, 2, 8 * KIB)
    for layer in range(layers):
        for block in range(blocks):
            start = layer * layer_stride + block * size
            assert layout.byte_range(BlockId(block), layer) == range(start, start + size)
    assert layout.page_bytes == layers * 8 * KIB


def test_keys_and_values_apart_and_groups_of_other_geometry_are_regions() -> None:
    layout = BlockLayout.layer_outermost(100, [4 * KIB, 4 * KIB, 2 * KIB], 2, 4 * KIB)
    assert [region.offset_bytes for region in layout.regions] == [0, 400 * KIB, 800 * KIB]
    assert layout.size_bytes == 1000 * KIB


def test_last_page_may_be_short() -> None:
    layout = BlockLayout.block_outermost(10, 4 * KIB, 4, 4 * KIB)
    assert layout.num_pages == 3
    assert list(layout.blocks_of(PageId(2))) == [8, 9]
    assert layout.size_bytes == 48 * KIB


@pytest.mark.parametrize(
    ("blocks", "per_page", "granularity", "regions", "message"),
    [
        (0, 1, 64, (Region(0, 64, 64),), "must be > 0"),
        (1, 0, 64, (Region(0, 64, 64),), "must be > 0"),
        (1, 1, 0, (Region(0, 64, 64),), "must be > 0"),
        (1, 1, 64, (), "at least one region"),
        (4, 1, 64, (Region(0, 32, 32),), "multiples of the granularity"),
        (4, 1, 64, (Region(32, 64, 64),), "multiples of the granularity"),
        (4, 1, 64, (Region(128, 64, 64), Region(0, 64, 64)), "overlaps the one before it"),
        (3, 2, 64, (Region(0, 32, 32), Region(64, 32, 32)), "overlaps the one before it"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(
    blocks: int, per_page: int, granularity: int, regions: tuple[Region, ...], message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        BlockLayout(blocks, per_page, granularity, regions)


@pytest.mark.parametrize(("offset", "stride", "size"), [(-64, 64, 64), (0, 64, 65), (0, 64, 0)])
def test_regions_that_overlap_themselves_are_refused(offset: int, stride: int, size: int) -> None:
    with pytest.raises(InvalidArgumentError, match="overlap or are empty"):
        Region(offset, stride, size)


def test_foreign_ids_are_named() -> None:
    layout = BlockLayout.block_outermost(10, 64, 4, 64)
    for block in (-1, 10):
        with pytest.raises(InvalidArgumentError, match=f"block {block} is outside 0..9"):
            layout.page_of(BlockId(block))
        with pytest.raises(InvalidArgumentError, match=f"block {block} "):
            layout.byte_range(BlockId(block))
    for page in (-1, 3):
        with pytest.raises(InvalidArgumentError, match=f"page {page} is outside 0..2"):
            layout.blocks_of(PageId(page))
        with pytest.raises(InvalidArgumentError, match=f"page {page} "):
            layout.page_byte_range(PageId(page))


def test_page_of_an_8b_model_is_one_handle_of_256_tokens() -> None:
    block = 32 * 2 * 8 * 128 * 2 * 16  # layers, K and V, heads, head, bf16, tokens
    assert block == 2 * MIB
    assert choose_page(block, 16, 2 * MIB) == 16


def test_page_of_a_small_model_suits_the_granularity() -> None:
    block = 24 * 2 * 2 * 64 * 2 * 16  # 192 KiB
    blocks = choose_page(block, 16, 2 * MIB)
    assert blocks == 32
    assert blocks * block % (2 * MIB) == 0


def test_page_of_layer_outermost_regions_suits_every_region() -> None:
    sizes = [64 * KIB, 64 * KIB, 48 * KIB]
    blocks = choose_page(sizes, 16, 2 * MIB)
    assert all(blocks * size % (2 * MIB) == 0 for size in sizes)
    BlockLayout.layer_outermost(1000, sizes, blocks, 2 * MIB)


@given(
    st.lists(st.integers(1, 4096).map(lambda n: n * 128), min_size=1, max_size=6),
    st.sampled_from([1, 8, 16, 64]),
    st.sampled_from([4 * KIB, 2 * MIB]),
    st.sampled_from([CUDA_LIMITS, HOST_LIMITS]),
    st.integers(1, 10**6),
)
def test_chosen_pages_are_valid_and_bound_the_mappings(
    sizes: list[int], tokens: int, granularity: int, limits: PageLimits, num_blocks: int
) -> None:
    blocks = choose_page(
        sizes, tokens, granularity, limits, num_blocks=num_blocks, max_mappings=1000
    )
    layout = BlockLayout.layer_outermost(num_blocks, sizes, blocks, granularity)
    assert layout.num_pages * len(sizes) <= 1000
    unbound = choose_page(sizes, tokens, granularity, limits)
    step = math.lcm(*(granularity // math.gcd(granularity, size) for size in sizes))
    within = unbound * sum(sizes) <= limits.max_bytes and unbound * tokens <= limits.max_tokens
    assert within or unbound == step


def test_padding_keeps_the_pages_of_an_awkward_block_small() -> None:
    """MLA: 61 layers of 576 values, 16 tokens: exact pages would take over a gigabyte."""
    block = 61 * 576 * 2 * 16
    assert choose_page(block, 16, 2 * MIB) * block > 1024 * MIB
    blocks, stride = choose_padded_page(block, 16, 2 * MIB)
    assert blocks * stride <= 64 * MIB
    assert (stride - block) / block < 0.06
    BlockLayout.block_outermost(1000, block, blocks, 2 * MIB, stride)


@given(
    st.integers(1, 1 << 24),
    st.sampled_from([1, 16, 64]),
    st.sampled_from([4 * KIB, 2 * MIB]),
    st.sampled_from([CUDA_LIMITS, HOST_LIMITS]),
)
def test_padded_pages_are_valid(
    block: int, tokens: int, granularity: int, limits: PageLimits
) -> None:
    blocks, stride = choose_padded_page(block, tokens, granularity, limits)
    layout = BlockLayout.block_outermost(77, block, blocks, granularity, stride)
    assert stride % 256 == 0
    assert layout.num_pages == ceil_div(77, blocks)


def test_sizes_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="positive sizes"):
        choose_page([], 16, 4096)
    with pytest.raises(InvalidArgumentError, match="positive sizes"):
        choose_page([64, 0], 16, 4096)
    with pytest.raises(InvalidArgumentError, match="positive sizes"):
        choose_padded_page(64, 0, 4096)
    with pytest.raises(InvalidArgumentError, match="not ordered"):
        PageLimits(2, 1, 1, 1)


def test_mappings_of_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "max_map_count"
    path.write_text("65530\n")
    assert max_arena_mappings(path) == 16382
    path.write_text("nonsense")
    assert max_arena_mappings(path) == 16382
    assert max_arena_mappings(tmp_path / "missing") == 16382
    assert max_arena_mappings() > 0
