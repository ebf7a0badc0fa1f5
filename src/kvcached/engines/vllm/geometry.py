"""What vLLM's KV-cache configuration means in blocks, pages and bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvcached.engines.vllm.device import Device
from kvcached.errors import EngineError
from kvcached.layout import BlockLayout, PageLimits, choose_page
from kvcached.units import ceil_div, round_up

# The smallest page that the granularity allows: the step in which a chosen page size is rounded.
_SMALLEST = PageLimits(1, 1 << 30, 1, 1 << 50)
_KINDS = {"FullAttentionSpec", "SlidingWindowSpec"}


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


def of(cache_config: Any, block_bytes: int, device: Device, page_bytes: int | None) -> Geometry:
    """The geometry of a ``KVCacheConfig`` whose blocks take ``block_bytes``.

    The scheduler's process and the workers' compute the same one, each by itself. Raises
    EngineError where the KV cache is of a kind that is not supported yet.
    """
    groups = cache_config.kv_cache_groups
    if not groups or not block_bytes:
        raise EngineError("kvcached: this model has no KV cache; run it without kvcached")
    tokens = {group.kv_cache_spec.block_size for group in groups}
    kinds = {type(group.kv_cache_spec).__name__ for group in groups}
    if len(tokens) != 1 or not kinds <= _KINDS:
        raise EngineError(
            f"kvcached does not support KV caches of kind {sorted(kinds)} with block sizes "
            f"{sorted(tokens)} yet (supported: full and sliding-window attention, one block size)"
        )
    block_tokens = tokens.pop()
    blocks_per_page = choose_page(
        block_bytes,
        block_tokens,
        device.granularity,
        device.page_limits,
        num_blocks=cache_config.num_blocks,
        max_mappings=device.max_mappings,
    )
    if page_bytes is not None:
        step = choose_page(block_bytes, block_tokens, device.granularity, _SMALLEST)
        blocks_per_page = round_up(ceil_div(page_bytes, block_bytes), step)
    return Geometry(cache_config.num_blocks, block_tokens, block_bytes, blocks_per_page)
