"""SGLang 0.5.15: what differs from other versions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components.pool_stats_observer import SchedulerPoolStatsObserver
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.model_executor import model_runner_kv_cache_mixin

from kvcached.config import Config
from kvcached.engines.base import Seam
from kvcached.engines.sglang import expects, family_0_5, kv_pools, parts, steps
from kvcached.engines.sglang.family_0_5 import Cache, arguments
from kvcached.engines.sglang.parts import TOGETHER

__all__ = ["EXPECTS", "PLATFORMS", "TOGETHER", "Cache", "arguments", "seams"]

PLATFORMS = ("cpu", "cuda")
_MIXIN = "sglang.srt.model_executor.model_runner_kv_cache_mixin:ModelRunnerKVCacheMixin"
EXPECTS = {
    **expects.V0_5_15,
    f"{_MIXIN}._profile_available_bytes": "self, pre_model_load_memory",
}


def _chunk_left(scheduler: Any) -> int:
    req = scheduler.chunked_req
    return 0 if req is None else len(req.full_untruncated_fill_ids) - int(req.extend_range.end)


def stream(scheduler: Any) -> int:
    """The handle of the CUDA stream on which steps run."""
    return int(scheduler.forward_stream.cuda_stream)


_PARTS = parts.Parts(
    extend_tokens=lambda req: len(req.full_untruncated_fill_ids) - len(req.prefix_indices),
    chunk_left=_chunk_left,
    decode_blocks=family_0_5.decode_blocks,
    release_last=family_0_5.release_last,
    retracted=family_0_5.retracted,
)


def seams(config: Config) -> Sequence[Seam]:
    """Everything that is replaced in SGLang's own code; the rest are subclasses."""
    mixin = model_runner_kv_cache_mixin.ModelRunnerKVCacheMixin
    return (
        Seam(MHATokenToKVPool, "_create_buffers", kv_pools.answer_mha_zeros),
        Seam(MLATokenToKVPool, "_create_buffers", kv_pools.create_mla_buffers),
        Seam(mixin, "_profile_available_bytes", parts.virtual_bytes),
        *parts.allocators(model_runner_kv_cache_mixin),
        *parts.scheduling(config, _PARTS),
        Seam(SchedulerPoolStatsObserver, "get_pool_stats", steps.counting),
        Seam(Scheduler, "on_idle", steps.wrap_idle),
    )
