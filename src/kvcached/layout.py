"""The arithmetic from block ids to pages and byte ranges. No memory, no torch, no engine.

A layout is one space of block ids over one arena. Its bytes lie in one or more *regions*, each a
contiguous run in which block ``b`` starts at ``offset + b * stride``:

- block-outermost: one region, a block holds all layers, K and V. One page is one handle.
- layer-outermost: a region for each layer, or for each layer's K and V apart. One page is one
  handle a region.
- groups of layers with different geometry that share block ids: regions of different stride.
- MLA: one buffer a layer, so the same with K and V as one.

Groups with block ids of their own are layouts of their own.

A block never lies in two pages: a page holds a whole number of blocks in every region. It is the
simplest rule that is right: a page can be unmapped exactly when its own blocks are free. Where a
block's size does not suit the granularity (a page would grow too large), its stride is padded by
a few per cent instead (``choose_padded_page``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NewType, cast

from kvcached.errors import InvalidArgumentError
from kvcached.units import KIB, MIB, ceil_div, round_up

BlockId = NewType("BlockId", int)
PageId = NewType("PageId", int)

_STRIDE_ALIGNMENT_BYTES = 256  # padded strides keep tensors aligned for wide loads
_DEFAULT_MAX_MAP_COUNT = 65530  # Linux's own default


@dataclass(frozen=True, slots=True)
class PageLimits:
    """What a good page is. Too small costs driver calls, too large shares coarsely."""

    min_tokens: int
    max_tokens: int
    min_bytes: int
    max_bytes: int
    max_runs: int = 1
    """Into how many groups of layers a block may be divided, each with a handle of its own in every
    page. Attention reads one layer at a time: the nearer its blocks, the fewer addresses the
    device has to translate.
    """
    min_run_bytes: int = 1  # of a block in each such group

    def __post_init__(self) -> None:
        if not (0 < self.min_tokens <= self.max_tokens and 0 < self.min_bytes <= self.max_bytes):
            raise InvalidArgumentError(f"page limits are not ordered: {self}")


# The driver charges for each handle; what runs are worth: docs/performance.md.
CUDA_LIMITS = PageLimits(256, 1024, 2 * MIB, 64 * MIB, max_runs=4, min_run_bytes=512 * KIB)
HOST_LIMITS = PageLimits(64, 1024, 64 * KIB, 8 * MIB)  # the kernel charges for each byte


@dataclass(frozen=True, slots=True)
class Region:
    """A run of blocks: block ``b`` covers ``block_bytes`` from ``offset_bytes + b * stride``."""

    offset_bytes: int
    block_stride_bytes: int
    block_bytes: int

    def __post_init__(self) -> None:
        if self.offset_bytes < 0 or not 0 < self.block_bytes <= self.block_stride_bytes:
            raise InvalidArgumentError(f"a region's blocks overlap or are empty: {self}")


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Where the blocks of one id space lie in an arena, and which page holds which.

    ``num_blocks`` ids count from 0. The last page may hold fewer blocks than the others; its
    bytes are part of the arena all the same. Raises InvalidArgumentError where a page is not a
    multiple of the granularity in every region, or where regions overlap.
    """

    num_blocks: int
    blocks_per_page: int
    granularity_bytes: int
    regions: tuple[Region, ...]

    def __post_init__(self) -> None:
        if min(self.num_blocks, self.blocks_per_page, self.granularity_bytes) <= 0:
            raise InvalidArgumentError(f"blocks, blocks per page, granularity must be > 0: {self}")
        if not self.regions:
            raise InvalidArgumentError("a layout needs at least one region")
        end = 0
        for region in sorted(self.regions, key=lambda region: region.offset_bytes):
            chunk = self._chunk_bytes(region)
            if chunk % self.granularity_bytes or region.offset_bytes % self.granularity_bytes:
                raise InvalidArgumentError(
                    f"{region}: its offset and its {chunk} bytes a page must be multiples of the "
                    f"granularity of {self.granularity_bytes} bytes"
                )
            if region.offset_bytes < end:
                raise InvalidArgumentError(f"{region} overlaps the one before it, up to {end}")
            end = region.offset_bytes + self.num_pages * chunk

    @classmethod
    def block_outermost(
        cls,
        num_blocks: int,
        block_bytes: int,
        blocks_per_page: int,
        granularity_bytes: int,
        block_stride_bytes: int | None = None,
    ) -> BlockLayout:
        """One region: a block holds all layers. The stride defaults to ``block_bytes``."""
        region = Region(0, block_stride_bytes or block_bytes, block_bytes)
        return cls(num_blocks, blocks_per_page, granularity_bytes, (region,))

    @classmethod
    def layer_outermost(
        cls,
        num_blocks: int,
        block_bytes: Sequence[int],
        blocks_per_page: int,
        granularity_bytes: int,
    ) -> BlockLayout:
        """A region for each entry of ``block_bytes`` (a layer, or its K or V), end to end.

        Engines whose tensors lie elsewhere give their own offsets to the constructor.
        """
        pages = ceil_div(num_blocks, max(blocks_per_page, 1))
        regions, offset = [], 0
        for size in block_bytes:
            regions.append(Region(offset, size, size))
            offset += pages * blocks_per_page * size
        return cls(num_blocks, blocks_per_page, granularity_bytes, tuple(regions))

    @property
    def num_pages(self) -> int:
        return ceil_div(self.num_blocks, self.blocks_per_page)

    @property
    def page_bytes(self) -> int:
        """Bytes that one page takes on the device, over all regions."""
        return sum(self._chunk_bytes(region) for region in self.regions)

    @property
    def zero_bytes(self) -> int:
        """Bytes of the zeros that back holes where an arena is told to have none: a page's bytes
        in one region, once for each size.
        """
        return sum({self._chunk_bytes(region) for region in self.regions})

    @property
    def size_bytes(self) -> int:
        """The reservation that holds all pages of all regions."""
        return max(
            region.offset_bytes + self.num_pages * self._chunk_bytes(region)
            for region in self.regions
        )

    def arena_regions(self) -> list[tuple[int, int]]:
        """``(offset, bytes a page)`` of every region, as ``vmm_ops.Arena`` takes them."""
        return [(region.offset_bytes, self._chunk_bytes(region)) for region in self.regions]

    def page_of(self, block: BlockId) -> PageId:
        """The page that holds the block. Raises InvalidArgumentError for a foreign id."""
        self._check_block(block)
        return PageId(block // self.blocks_per_page)

    def blocks_of(self, page: PageId) -> Sequence[BlockId]:
        """The blocks of a page: a range. Raises InvalidArgumentError for a foreign id."""
        self._check_page(page)
        first = page * self.blocks_per_page
        blocks = range(first, min(first + self.blocks_per_page, self.num_blocks))
        return cast("Sequence[BlockId]", blocks)

    def byte_range(self, block: BlockId, region: int = 0) -> range:
        """The block's bytes in one region, counted from the start of the arena."""
        self._check_block(block)
        place = self.regions[region]
        start = place.offset_bytes + block * place.block_stride_bytes
        return range(start, start + place.block_bytes)

    def page_byte_range(self, page: PageId, region: int = 0) -> range:
        """The bytes in one region that mapping the page brings to life."""
        self._check_page(page)
        place = self.regions[region]
        chunk = self._chunk_bytes(place)
        return range(place.offset_bytes + page * chunk, place.offset_bytes + (page + 1) * chunk)

    def _chunk_bytes(self, region: Region) -> int:
        return self.blocks_per_page * region.block_stride_bytes

    def _check_block(self, block: int) -> None:
        if not 0 <= block < self.num_blocks:
            raise InvalidArgumentError(f"block {block} is outside 0..{self.num_blocks - 1}")

    def _check_page(self, page: int) -> None:
        if not 0 <= page < self.num_pages:
            raise InvalidArgumentError(f"page {page} is outside 0..{self.num_pages - 1}")


def choose_page(
    block_bytes: int | Sequence[int],
    tokens_per_block: int,
    granularity: int,
    limits: PageLimits = CUDA_LIMITS,
    *,
    num_blocks: int | None = None,
    max_mappings: int | None = None,
) -> int:
    """Blocks in a page, for blocks that take exactly ``block_bytes`` in each region.

    The smallest number that suits the granularity in every region and reaches the lower limits,
    or the largest below the upper limits where both cannot be had. With ``num_blocks`` and
    ``max_mappings`` (see ``max_arena_mappings``) a page is large enough that all of them mapped
    are no more mappings than that, whatever the limits say. The result may exceed the upper
    limits where the block's size suits the granularity badly: see ``choose_padded_page``.
    """
    sizes = [block_bytes] if isinstance(block_bytes, int) else list(block_bytes)
    if not sizes or min(*sizes, tokens_per_block, granularity, 1) <= 0:
        raise InvalidArgumentError(
            f"choose_page needs positive sizes, got {sizes} bytes a block, {tokens_per_block} "
            f"tokens, granularity {granularity}"
        )
    step = math.lcm(*(granularity // math.gcd(granularity, size) for size in sizes))
    wanted = round_up(_least_blocks(sum(sizes), tokens_per_block, limits), step)
    most = min(limits.max_bytes // sum(sizes), limits.max_tokens // tokens_per_block)
    blocks = max(min(wanted, most // step * step), step)
    if num_blocks is not None and max_mappings is not None:
        most_pages = max(max_mappings // len(sizes), 1)
        blocks = max(blocks, round_up(ceil_div(num_blocks, most_pages), step))
    return blocks


def choose_padded_page(
    block_bytes: int,
    tokens_per_block: int,
    granularity: int,
    limits: PageLimits = CUDA_LIMITS,
    *,
    max_waste: float = 1 / 32,
) -> tuple[int, int]:
    """``(blocks in a page, stride)`` for block-outermost blocks whose stride may be padded.

    The smallest power of two of blocks within the limits that pads by no more than ``max_waste``
    of a block; where none does, the one that pads least.
    """
    if min(block_bytes, tokens_per_block, granularity) <= 0:
        raise InvalidArgumentError(
            f"choose_padded_page needs positive sizes, got {block_bytes} bytes a block, "
            f"{tokens_per_block} tokens, granularity {granularity}"
        )
    least = _least_blocks(block_bytes, tokens_per_block, limits)
    candidates: list[tuple[int, int]] = []
    blocks = 1 << (least - 1).bit_length()
    while not candidates or (
        blocks * tokens_per_block <= limits.max_tokens and blocks * block_bytes <= limits.max_bytes
    ):
        step = granularity // math.gcd(granularity, blocks)
        stride = round_up(block_bytes, math.lcm(step, _STRIDE_ALIGNMENT_BYTES))
        if stride - block_bytes <= max_waste * block_bytes:
            return blocks, stride
        candidates.append((stride, blocks))
        blocks *= 2
    stride, blocks = min(candidates)
    return blocks, stride


def max_arena_mappings(path: Path = Path("/proc/sys/vm/max_map_count")) -> int:
    """Mappings that one arena may have on this machine: a quarter of vm.max_map_count.

    Every mapping may have a hole beside it, so an arena takes up to half of what a process has.
    """
    try:
        return max(int(path.read_text()) // 4, 1)
    except (OSError, ValueError):
        return _DEFAULT_MAX_MAP_COUNT // 4


def _least_blocks(block_bytes: int, tokens_per_block: int, limits: PageLimits) -> int:
    return max(
        ceil_div(limits.min_tokens, tokens_per_block), ceil_div(limits.min_bytes, block_bytes)
    )
