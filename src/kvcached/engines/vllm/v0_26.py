"""vLLM 0.26: what an adapter consists of, and where this version's parts are."""

from kvcached.engines.vllm import expects_0_26 as expects
from kvcached.engines.vllm import scheduling
from kvcached.engines.vllm import tensors_0_24 as tensors
from kvcached.engines.vllm.layers import used_backends
from kvcached.engines.vllm.seams import usual as seams
from kvcached.engines.vllm.steps import new_blocks

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

PLATFORMS = ("cpu",)
SLEEPS = False
