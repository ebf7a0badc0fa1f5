"""vLLM's block pool on elastic pages, and the admission that grows it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.request import RequestStatus

from kvcached.errors import EngineError
from kvcached.pages import PagePool
from kvcached.units import ceil_div
from kvcached.vmm_ops import BlockQueue

# Called for each allocation: looking it up through super() would cost a tenth of the call.
_get_new_blocks: Callable[[BlockPool, int], list[Any]] = BlockPool.get_new_blocks


class ElasticBlockPool(BlockPool):  # type: ignore[misc]
    """vLLM's own pool over a free queue that knows pages.

    Hashes, reference counts, events and metrics stay vLLM's. The queue holds only blocks of pages
    that the instance has leased, so what it counts is owned: nobody can take it between vLLM's
    check and vLLM's allocation.
    """

    free_block_queue: Any

    def bind(self, pages: PagePool) -> None:
        """Puts the page pool under this pool; called once, before any block is handed out."""
        if self.null_block.block_id != 0 or self.free_block_queue.num_free_blocks != (
            self.num_gpu_blocks - 1
        ):
            raise EngineError("kvcached: vLLM's block pool did not start as expected")
        self.pages = pages
        self.core = pages.blocks
        self.queue = self.free_block_queue = BlockQueue(pages.blocks, self.blocks, "_block_hash")
        # Bound straight to the core: called in each admission check, it must cost nothing.
        self.get_num_free_blocks = self.queue.available

    def forget(self, ids: Sequence[int]) -> None:
        """Drops the hashes of blocks whose contents are gone with their page."""
        for block_id in ids:
            self._maybe_evict_cached_block(self.blocks[block_id])

    def get_new_blocks(self, num_blocks: int) -> list[Any]:
        if num_blocks > self.queue.num_unused_blocks:
            self.pages.prefer_growth(num_blocks)
        return _get_new_blocks(self, num_blocks)

    def get_usage(self) -> float:
        total = self.num_gpu_blocks - 1
        return (self.core.used_blocks - 1) / total if total else 0.0

    def reset_prefix_cache(self) -> bool:
        # vLLM compares its virtual number of blocks with the free ones; here most are not present.
        used = self.core.used_blocks
        self.get_num_free_blocks = lambda: self.num_gpu_blocks - used
        try:
            done: bool = super().reset_prefix_cache()
        finally:
            self.get_num_free_blocks = self.queue.available
        if done:
            self.core.uncache_all()
        return done


class ElasticKVCacheManager(KVCacheManager):  # type: ignore[misc]
    """Grows the pool where vLLM's own admission finds it too small, and asks again.

    Refusing leaves no trace in vLLM, so asking twice is safe; the common case asks once.
    """

    # Set by the scheduler: told of a request that found no memory, and the blocks it needs.
    # ``on_refusal`` may wait for memory that is about to come, and says whether it came.
    on_refusal: Any = None
    on_shortage: Any = None

    def allocate_slots(self, request: Any, num_new_tokens: int, *args: Any, **kwargs: Any) -> Any:
        if self.block_pool.pages.closed and request.status != RequestStatus.RUNNING:
            return None  # the blocks that are free here are owed to others
        slots = super().allocate_slots(request, num_new_tokens, *args, **kwargs)
        if slots is not None:
            return slots
        needed = self._blocks_needed(request, num_new_tokens, args, kwargs)
        pages = self.block_pool.pages
        if pages.ensure(needed) or (self.on_refusal(request, needed) and pages.ensure(needed)):
            slots = super().allocate_slots(request, num_new_tokens, *args, **kwargs)
        if slots is None:
            self.on_shortage(request, needed)
        return slots

    def _blocks_needed(
        self, request: Any, num_new_tokens: int, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> int:
        """An upper bound of the blocks that this call wants: prefix hits count as new ones."""
        cached_tokens = args[0] if args else kwargs.get("num_new_computed_tokens", 0)
        tokens = (
            request.num_computed_tokens
            + cached_tokens
            + num_new_tokens
            + kwargs.get("num_lookahead_tokens", 0)
            + kwargs.get("num_external_computed_tokens", 0)
        )
        tokens = min(tokens, self.max_model_len)
        whole = request.num_tokens if kwargs.get("full_sequence_must_fit", False) else 0
        whole = min(whole, self.max_model_len)
        needed = self.watermark_blocks + int(kwargs.get("reserved_blocks", 0))
        for manager in self.coordinator.single_type_managers:
            held = len(manager.req_to_blocks.get(request.request_id, ()))
            in_all = min(ceil_div(whole, manager.block_size), _most_at_once(manager))
            needed += max(0, max(ceil_div(tokens, manager.block_size), in_all) - held)
        return int(needed)


def _most_at_once(manager: Any) -> float:
    """Blocks that a request never holds more of at a time: what lies outside a window is freed."""
    for name in ("max_admission_blocks_per_request", "_max_admission_blocks_per_request"):
        most = getattr(manager, name, None)
        if most is not None:
            return int(most)
    return math.inf
