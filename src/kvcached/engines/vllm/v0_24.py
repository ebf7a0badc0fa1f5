"""vLLM 0.24: what an adapter consists of, and where this version's parts are."""

from kvcached.engines.vllm import tensors_0_24 as tensors
from kvcached.engines.vllm.seams import seams

__all__ = ["PLATFORMS", "seams", "tensors"]

PLATFORMS = ("cpu", "cuda")
