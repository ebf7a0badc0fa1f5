"""SGLang 0.5.23: what differs from other versions."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components.pool_stats_observer import SchedulerPoolStatsObserver
from sglang.srt.mem_cache import kv_cache_configurator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

from kvcached.config import Config
from kvcached.engines.base import Seam
from kvcached.engines.sglang import admission, build, kv_pools, steps
from kvcached.engines.sglang.allocators import (
    ElasticPagedAllocator,
    ElasticTokenAllocator,
    elastic,
)
from kvcached.errors import EngineError
from kvcached.units import ceil_div

__all__ = ["PLATFORMS", "TOGETHER", "Cache", "arguments", "seams"]

PLATFORMS = ("cpu",)
TOGETHER = frozenset({"torch_native"})


def arguments(server_args: Any) -> Mapping[str, Any]:
    """The settings in effect; ``server_args`` itself keeps what was given."""
    settings: dict[str, Any] = server_args.resolved_dict()
    return settings


class Cache:
    """See ``slots.PrefixCache``."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._tree = scheduler.tree_cache

    def evictable_tokens(self) -> int:
        return int(self._tree.evictable_size())

    def evict(self, tokens: int) -> None:
        self._tree.evict(EvictParams(num_tokens=tokens))

    def held_slots(self) -> Iterator[torch.Tensor]:
        rows = self._scheduler.req_to_token_pool.req_to_token
        for req in steps.requests_under_way(self._scheduler):
            if req.kv.holds_kv:
                yield rows[req.kv.req_pool_idx, : req.kv.kv_allocated_len]
        for kv in self._tree.session_records().values():
            if kv.holds_kv:
                yield rows[kv.req_pool_idx, : kv.kv_allocated_len]


def _extend_tokens(req: Any) -> int:
    return len(req.full_untruncated_fill_ids) - int(req.prefix_len)


def _chunk_left(scheduler: Any) -> int:
    req = scheduler.chunked_req
    return 0 if req is None else len(req.full_untruncated_fill_ids) - int(req.extend_end)


def _decode_blocks(batch: Any, *args: Any, **kwargs: Any) -> int:
    tokens = batch.new_tokens_required_next_decode(*args, **kwargs)
    return ceil_div(tokens, batch.token_to_kv_pool_allocator.page_size)


def _release_last(batch: Any) -> Any:
    (req,) = batch.reqs
    if not batch.release_req(0, 0):
        raise EngineError("kvcached: SGLang could not take its last request back into the queue")
    batch.filter_batch(keep_indices=[])
    return req


def _create_mha(original: Any) -> Any:
    @functools.wraps(original)
    def _create_buffers_normal(self: Any) -> None:
        if self.use_hnd or self.kv_cache_layout != "nhd":
            raise EngineError(
                f"kvcached does not support the KV cache layout {self.kv_cache_layout}"
            )
        kv_pools.create_mha(self, *(shape[1:] for shape in self._kv_buffer_shapes()))

    return _create_buffers_normal


def _create_mla(original: Any) -> Any:
    @functools.wraps(original)
    def _create_buffers(self: Any) -> None:
        kv_pools.create_mla(self, (1, self.kv_cache_dim))

    return _create_buffers


def _available_bytes(original: Any) -> Any:
    @functools.wraps(original)
    def _profile_available_bytes(self: Any, pre_model_load_memory: int) -> int:
        if self.mambaish_config is not None:
            raise EngineError("kvcached does not support models with Mamba layers in SGLang yet")
        return build.current().virtual_bytes

    return _profile_available_bytes


def seams(config: Config) -> Sequence[Seam]:
    """Everything that is replaced in SGLang's own code; the rest are subclasses."""
    decoding = admission.wrap_check_decode_mem(_decode_blocks)
    retracting = admission.wrap_retract_decode(_decode_blocks, _release_last)
    adding = admission.wrap_add_one_req(_extend_tokens, AddReqResult.NO_TOKEN)
    batch = steps.wrap_get_next_batch(lambda plan: plan.batch_to_run, _chunk_left)
    configurator = kv_cache_configurator.KVCacheConfigurator
    return (
        Seam(MHATokenToKVPool, "_create_buffers_normal", _create_mha),
        Seam(MLATokenToKVPool, "_create_buffers", _create_mla),
        Seam(configurator, "_profile_available_bytes", _available_bytes),
        Seam(
            kv_cache_configurator,
            "TokenToKVPoolAllocator",
            functools.partial(elastic, ElasticTokenAllocator),
        ),
        Seam(
            kv_cache_configurator,
            "PagedTokenToKVPoolAllocator",
            functools.partial(elastic, ElasticPagedAllocator),
        ),
        Seam(PrefillAdder, "add_one_req", adding),
        Seam(ScheduleBatch, "check_decode_mem", decoding),
        Seam(ScheduleBatch, "retract_decode", retracting),
        Seam(SchedulerPoolStatsObserver, "get_pool_stats", steps.counting),
        Seam(Scheduler, "__init__", steps.wrap_init(config)),
        Seam(Scheduler, "get_next_batch_to_run", batch),
        Seam(Scheduler, "run_batch", steps.wrap_run_batch),
        Seam(Scheduler, "process_batch_result", steps.wrap_process_batch_result),
        Seam(Scheduler, "on_idle", steps.wrap_idle),
    )
