"""vLLM's block pool on elastic pages, and the admission that grows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.request import RequestStatus

from kvcached.errors import EngineError
from kvcached.pages import PagePool
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

    # Set by the scheduler: how this version of vLLM counts (the adapter's ``scheduling``); told of
    # a request that found no memory, and the blocks it needs. ``on_refusal`` may wait for memory
    # that is about to come, and says whether it came.
    this_version: Any = None
    on_refusal: Callable[[Any, int], bool]
    on_shortage: Callable[[Any, int], None]

    def allocate_slots(self, request: Any, num_new_tokens: int, *args: Any, **kwargs: Any) -> Any:
        if self.block_pool.pages.closed and request.status != RequestStatus.RUNNING:
            return None  # the blocks that are free here are owed to others
        slots = super().allocate_slots(request, num_new_tokens, *args, **kwargs)
        if slots is not None:
            return slots
        needed = self.this_version.blocks_needed(self, request, num_new_tokens, args, kwargs)
        if self._grow(request, needed):
            slots = super().allocate_slots(request, num_new_tokens, *args, **kwargs)
        if slots is None:
            self.on_shortage(request, needed)
        return slots

    def can_fit_full_sequence(self, request: Any, *args: Any, **kwargs: Any) -> bool:
        """Asked before admission by vLLM 0.19 alone."""
        if super().can_fit_full_sequence(request, *args, **kwargs):
            return True
        needed = self.this_version.sequence_blocks_needed(self, request)
        if self._grow(request, needed) and super().can_fit_full_sequence(request, *args, **kwargs):
            return True
        self.on_shortage(request, needed)
        return False

    def _grow(self, request: Any, needed: int) -> bool:
        pages = self.block_pool.pages
        if pages.ensure(needed):
            return True
        return self.on_refusal(request, needed) and bool(pages.ensure(needed))
