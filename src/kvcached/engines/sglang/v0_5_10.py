"""SGLang 0.5.10: what differs from other versions."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from sglang.srt.managers.scheduler_runtime_checker_mixin import SchedulerRuntimeCheckerMixin
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.model_executor import model_runner_kv_cache_mixin

from kvcached.config import Config
from kvcached.engines.base import Seam, substituted
from kvcached.engines.sglang import admission, build, expects, family_0_5, kv_pools, parts, steps
from kvcached.engines.sglang.family_0_5 import Cache, arguments
from kvcached.engines.sglang.parts import TOGETHER
from kvcached.errors import EngineError

__all__ = ["EXPECTS", "PLATFORMS", "TOGETHER", "Cache", "arguments", "seams"]

PLATFORMS = ("cpu",)
_MIXIN = "sglang.srt.model_executor.model_runner_kv_cache_mixin:ModelRunnerKVCacheMixin"
EXPECTS = {
    **expects.V0_5_10,
    f"{_MIXIN}.profile_max_num_token": "self, pre_model_load_memory",
}


def _chunk_left(scheduler: Any) -> int:
    req = scheduler.chunked_req
    return 0 if req is None else admission.length(req) - len(req.fill_ids)


def _max_num_token(original: Any) -> Any:
    """SGLang computes the number of slots from the memory that it finds free."""

    @functools.wraps(original)
    def profile_max_num_token(self: Any, pre_model_load_memory: int) -> int:
        if self.mambaish_config is not None:
            raise EngineError("kvcached does not support models with Mamba layers in SGLang yet")
        free_gib = build.current().virtual_bytes / (1 << 30)
        with substituted(
            model_runner_kv_cache_mixin, get_available_gpu_memory=lambda *_, **__: free_gib
        ):
            slots: int = original(self, 0)
        return slots

    return profile_max_num_token


_PARTS = parts.Parts(
    extend_tokens=lambda req: int(req.extend_input_len),
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
        Seam(mixin, "profile_max_num_token", _max_num_token),
        *parts.allocators(model_runner_kv_cache_mixin),
        *parts.scheduling(config, _PARTS),
        Seam(SchedulerRuntimeCheckerMixin, "_get_token_info", steps.counting),
        Seam(SchedulerRuntimeCheckerMixin, "self_check_during_idle", steps.wrap_idle),
    )
