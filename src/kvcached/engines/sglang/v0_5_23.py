"""SGLang 0.5.23: what differs from other versions."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components.pool_stats_observer import SchedulerPoolStatsObserver
from sglang.srt.mem_cache import kv_cache_configurator
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

from kvcached.config import Config
from kvcached.engines.base import Seam
from kvcached.engines.sglang import expects, family_0_5, kv_pools, parts, steps
from kvcached.engines.sglang.parts import TOGETHER
from kvcached.errors import EngineError

__all__ = ["EXPECTS", "PLATFORMS", "TOGETHER", "Cache", "arguments", "seams"]

PLATFORMS = ("cpu",)
_CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator:KVCacheConfigurator"
EXPECTS = {
    **expects.V0_5_23,
    f"{_CONFIGURATOR}._profile_available_bytes": "self, pre_model_load_memory",
}


def arguments(server_args: Any) -> Mapping[str, Any]:
    """The settings in effect; ``server_args`` itself keeps what was given."""
    settings: dict[str, Any] = server_args.resolved_dict()
    return settings


class Cache(family_0_5.Cache):
    """See ``slots.PrefixCache``."""

    EVICTING = ("evict", "evict_for_alloc")

    def held_slots(self) -> Iterator[torch.Tensor]:
        for req, table in self.rows():
            if req.kv.holds_kv:
                yield table[req.kv.req_pool_idx, : req.kv.kv_allocated_len]


def _chunk_left(scheduler: Any) -> int:
    req = scheduler.chunked_req
    return 0 if req is None else len(req.full_untruncated_fill_ids) - int(req.extend_end)


def _create_mha(original: Any) -> Any:
    @functools.wraps(original)
    def _create_buffers_normal(self: Any) -> None:
        if self.use_hnd or self.kv_cache_layout != "nhd":
            raise EngineError(
                f"kvcached does not support the KV cache layout {self.kv_cache_layout}"
            )
        kv_pools.create_mha(self, *(shape[1:] for shape in self._kv_buffer_shapes()))

    return _create_buffers_normal


_PARTS = parts.Parts(
    extend_tokens=lambda req: len(req.full_untruncated_fill_ids) - int(req.prefix_len),
    chunk_left=_chunk_left,
    decode_blocks=family_0_5.decode_blocks,
    release_last=family_0_5.release_last,
    retracted=family_0_5.retracted,
    batch_of=lambda plan: plan.batch_to_run,
)


def seams(config: Config) -> Sequence[Seam]:
    """Everything that is replaced in SGLang's own code; the rest are subclasses."""
    configurator = kv_cache_configurator.KVCacheConfigurator
    return (
        Seam(MHATokenToKVPool, "_create_buffers_normal", _create_mha),
        Seam(MLATokenToKVPool, "_create_buffers", kv_pools.create_mla_buffers),
        Seam(configurator, "_profile_available_bytes", parts.virtual_bytes),
        *parts.allocators(kv_cache_configurator),
        *parts.scheduling(config, _PARTS),
        Seam(SchedulerPoolStatsObserver, "get_pool_stats", steps.counting),
        Seam(Scheduler, "on_idle", steps.wrap_idle),
    )
