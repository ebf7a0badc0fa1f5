"""SGLang 0.4.6: what differs from other versions."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.mem_cache.chunk_cache import ChunkCache
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.model_executor import model_runner

from kvcached.config import Config
from kvcached.engines.base import Seam, substituted
from kvcached.engines.sglang import admission, build, kv_pools, steps
from kvcached.engines.sglang.allocators import (
    ElasticPagedAllocator,
    ElasticTokenAllocator,
    elastic,
)

__all__ = ["PLATFORMS", "TOGETHER", "Cache", "arguments", "seams"]

PLATFORMS = ("cpu",)
TOGETHER = frozenset({"torch_native"})


def arguments(server_args: Any) -> Mapping[str, Any]:
    """The settings; SGLang completes them while it builds the engine."""
    settings: dict[str, Any] = vars(server_args)
    return settings


class Cache:
    """See ``slots.PrefixCache``."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._tree = scheduler.tree_cache

    def evictable_tokens(self) -> int:
        return int(self._tree.evictable_size() or 0)  # without a radix tree it has no answer

    def evict(self, tokens: int) -> None:
        self._tree.evict(tokens)

    def held_slots(self) -> Iterator[torch.Tensor]:
        rows = self._scheduler.req_to_token_pool.req_to_token
        for req in steps.requests_under_way(self._scheduler):
            if req.req_pool_idx is not None:
                # A step may be under way that has taken a slot more.
                yield rows[req.req_pool_idx, : steps.length(req) + 1]


def _chunk_left(scheduler: Any) -> int:
    req = scheduler.chunked_req
    return 0 if req is None else steps.length(req) - len(req.fill_ids)


def _decode_blocks(batch: Any, buf_multiplier: int = 1) -> int:
    return int(batch.new_page_count_next_decode() * buf_multiplier)


def _release_last(batch: Any) -> Any:
    """What SGLang does with every other request that it retracts."""
    (req,) = batch.reqs
    if isinstance(batch.tree_cache, ChunkCache):
        first = 0
    else:
        page = batch.token_to_kv_pool_allocator.page_size
        first = len(req.prefix_indices) // page * page
        batch.tree_cache.dec_lock_ref(req.last_node)
    end = int(batch.seq_lens[0])
    rows = batch.req_to_token_pool.req_to_token
    batch.token_to_kv_pool_allocator.free(rows[req.req_pool_idx, first:end])
    batch.req_to_token_pool.free(req.req_pool_idx)
    req.reset_for_retract()
    batch.filter_batch(keep_indices=[])
    return req


def _create_mha(original: Any) -> Any:
    @functools.wraps(original)
    def _create_buffers(self: Any) -> None:
        shape = (self.head_num, self.head_dim)
        kv_pools.create_mha(self, shape, shape)

    return _create_buffers


def _max_num_token(original: Any) -> Any:
    """SGLang computes the number of slots from the memory that it finds free."""

    @functools.wraps(original)
    def profile_max_num_token(self: Any, total_gpu_memory: int) -> int:
        free_gib = build.current().virtual_bytes / (1 << 30)
        with substituted(model_runner, get_available_gpu_memory=lambda *_, **__: free_gib):
            slots: int = original(self, 0)
        return slots

    return profile_max_num_token


def seams(config: Config) -> Sequence[Seam]:
    """Everything that is replaced in SGLang's own code; the rest are subclasses."""
    decoding = admission.wrap_check_decode_mem(_decode_blocks)
    retracting = admission.wrap_retract_decode(_decode_blocks, _release_last)
    adding = admission.wrap_add_one_req(lambda req: req.extend_input_len, AddReqResult.NO_TOKEN)
    batch = steps.wrap_get_next_batch(lambda found: found, _chunk_left)
    tokens = functools.partial(elastic, ElasticTokenAllocator, free_list="free_slots")
    return (
        Seam(MHATokenToKVPool, "_create_buffers", _create_mha),
        Seam(MLATokenToKVPool, "__init__", kv_pools.answer_mla_zeros),
        Seam(model_runner.ModelRunner, "profile_max_num_token", _max_num_token),
        Seam(model_runner, "TokenToKVPoolAllocator", tokens),
        Seam(
            model_runner,
            "PagedTokenToKVPoolAllocator",
            functools.partial(elastic, ElasticPagedAllocator),
        ),
        Seam(PrefillAdder, "add_one_req", adding),
        Seam(ScheduleBatch, "check_decode_mem", decoding),
        Seam(ScheduleBatch, "retract_decode", retracting),
        Seam(ScheduleBatch, "prepare_for_decode", admission.skip_when_empty),
        Seam(Scheduler, "log_prefill_stats", steps.counting),
        Seam(Scheduler, "log_decode_stats", steps.counting),
        Seam(Scheduler, "__init__", steps.wrap_init(config)),
        Seam(Scheduler, "get_next_batch_to_run", batch),
        Seam(Scheduler, "run_batch", steps.wrap_run_batch),
        Seam(Scheduler, "process_batch_result", steps.wrap_process_batch_result),
        Seam(Scheduler, "check_memory", steps.wrap_idle),
    )
