"""vLLM 0.19: what an adapter consists of, and where this version's parts are."""

from collections.abc import Sequence

from vllm.v1.engine.input_processor import InputProcessor

from kvcached.engines.base import Seam
from kvcached.engines.vllm import expects_0_19 as expects
from kvcached.engines.vllm import scheduling
from kvcached.engines.vllm import tensors_0_13 as tensors
from kvcached.engines.vllm.layers import used_backends
from kvcached.engines.vllm.seams import client, common
from kvcached.engines.vllm.steps import new_blocks

__all__ = [
    "PLATFORMS",
    "expects",
    "new_blocks",
    "scheduling",
    "seams",
    "tensors",
    "used_backends",
]

PLATFORMS = ("cpu",)


def seams() -> Sequence[Seam]:
    """What is replaced in vLLM's own code."""
    return (*common(InputProcessor), client())
