"""vLLM 0.8.4: what an adapter consists of, and where this version's parts are."""

from collections.abc import Sequence
from typing import Any

from vllm.v1.engine.processor import Processor

from kvcached.engines.base import Seam
from kvcached.engines.vllm import expects_0_8 as expects
from kvcached.engines.vllm import scheduling_0_8 as scheduling
from kvcached.engines.vllm import tensors_0_8 as tensors
from kvcached.engines.vllm.seams import common, shutdown
from kvcached.engines.vllm.steps import new_blocks_0_8 as new_blocks

__all__ = [
    "PLATFORMS",
    "SLEEPS",
    "expects",
    "new_blocks",
    "scheduling",
    "seams",
    "tensors",
    "used_backends",
]

PLATFORMS = ("cuda",)
SLEEPS = False


def seams() -> Sequence[Seam]:
    """What is replaced in vLLM's own code."""
    return (*common(Processor), shutdown())


def used_backends(worker: Any) -> dict[str, Any]:
    """The backend of each attention layer, by the layer's name: they have one in common."""
    layers = worker.model_runner.get_kv_cache_spec()
    return dict.fromkeys(layers, worker.model_runner.attn_backend)
