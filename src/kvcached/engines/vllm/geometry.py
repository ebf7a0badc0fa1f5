"""What vLLM's KV-cache configuration means in blocks, pages and bytes (vLLM 0.32)."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

from kvcached.errors import EngineError
from kvcached.layout import HOST_LIMITS, BlockLayout, PageLimits, choose_page, max_arena_mappings
from kvcached.units import ceil_div, round_up

# The smallest page that the granularity allows: the step in which a chosen page size is rounded.
_SMALLEST = PageLimits(1, 1 << 30, 1, 1 << 50)


@dataclass(frozen=True, slots=True)
class Geometry:
    """Blocks of one engine as they lie in memory, block-outermost: one run of bytes a block."""

    num_blocks: int
    block_tokens: int
    block_bytes: int  # all layers, K and V
    blocks_per_page: int

    @property
    def page_bytes(self) -> int:
        return self.block_bytes * self.blocks_per_page

    def layout(self, granularity_bytes: int) -> BlockLayout:
        """The layout: one region, one handle a page."""
        return BlockLayout.block_outermost(
            self.num_blocks, self.block_bytes, self.blocks_per_page, granularity_bytes
        )


def of(cache_config: Any, granularity: int, page_bytes: int | None) -> Geometry:
    """The geometry of a ``KVCacheConfig``; raises EngineError where it is not supported yet."""
    if not cache_config.kv_cache_tensors:
        raise EngineError("kvcached: this model has no KV cache; run it without kvcached")
    groups = cache_config.kv_cache_groups
    tokens = {group.kv_cache_spec.block_size for group in groups}
    kinds = {type(group.kv_cache_spec).__name__ for group in groups}
    if len(tokens) != 1 or not kinds <= {"FullAttentionSpec", "SlidingWindowSpec"}:
        raise EngineError(
            f"kvcached does not support KV caches of kind {sorted(kinds)} with block sizes "
            f"{sorted(tokens)} yet (supported: full and sliding-window attention, one block size)"
        )
    block_tokens = tokens.pop()
    block_bytes = sum(_regions(cache_config).values())
    blocks_per_page = choose_page(
        block_bytes,
        block_tokens,
        granularity,
        HOST_LIMITS,
        num_blocks=cache_config.num_blocks,
        max_mappings=max_arena_mappings(),
    )
    if page_bytes is not None:
        step = choose_page(block_bytes, block_tokens, granularity, _SMALLEST)
        blocks_per_page = round_up(ceil_div(page_bytes, block_bytes), step)
    return Geometry(cache_config.num_blocks, block_tokens, block_bytes, blocks_per_page)


def block_outermost(cache_config: Any) -> Any:
    """A copy of the configuration whose tensors lie block-outermost: all layers of a block
    together, so that one page is one handle. vLLM honours the strides that its tensors state.
    """
    offsets: dict[int, int] = {}
    block_bytes = 0
    for start, stride in sorted(_regions(cache_config).items()):
        offsets[start] = block_bytes
        block_bytes += stride
    packed = copy.copy(cache_config)
    packed.kv_cache_tensors = [
        replace(
            tensor,
            offset=offsets[tensor.offset],
            layer_stride=(
                offsets[tensor.offset + tensor.layer_stride] - offsets[tensor.offset]
                if len(tensor.layers) > 1
                else tensor.block_stride
            ),
            block_stride=block_bytes,
        )
        for tensor in cache_config.kv_cache_tensors
    ]
    return packed


def _regions(cache_config: Any) -> dict[int, int]:
    """Start and block stride of each layer's region in vLLM's layer-outermost buffer. Groups that
    overlay each other share regions.
    """
    regions: dict[int, int] = {}
    for tensor in cache_config.kv_cache_tensors:
        if tensor.layer_stride < tensor.block_stride and len(tensor.layers) > 1:
            raise EngineError("kvcached: this KV cache is packed by vLLM itself: not supported yet")
        for index in range(len(tensor.layers)):
            start = tensor.offset + index * tensor.layer_stride
            if regions.setdefault(start, tensor.block_stride) != tensor.block_stride:
                raise EngineError("kvcached: layers of different size share memory: not supported")
    return regions
