"""Where vLLM 0.13 to 0.19 says that its KV cache's tensors lie: each ``KVCacheTensor`` is an
allocation of its own, blocks one after the other. Its views take no strides, so layers cannot lie
together.
"""

from __future__ import annotations

from typing import Any, NoReturn

from kvcached.engines.vllm.tensors_0_24 import layer_outermost, planes, runs
from kvcached.errors import EngineError

__all__ = [
    "BACKENDS",
    "allocations",
    "block_bytes",
    "block_outermost",
    "is_packed",
    "layer_outermost",
    "planes",
    "refusal",
    "runs",
]

BACKENDS: frozenset[str] = frozenset()
"""Attention backends that were seen to give right outputs with block-outermost strides."""


def refusal(backend: Any) -> str:
    """Why an attention backend cannot have its KV cache block-outermost."""
    return "a vLLM whose KV cache's tensors take no strides"


def is_packed(cache_config: Any) -> bool:
    """Whether vLLM itself lays all layers of a block together."""
    return False


def block_bytes(cache_config: Any) -> int:
    """Bytes of one block, all layers, K and V."""
    return sum(int(t.size) // int(cache_config.num_blocks) for t in cache_config.kv_cache_tensors)


def block_outermost(cache_config: Any) -> NoReturn:
    """Not to be had; ``refusal`` has said so."""
    raise EngineError("kvcached: this vLLM's KV cache cannot lie block-outermost")


def allocations(cache_config: Any) -> list[int]:
    """The sizes in bytes of what the model runner allocates for it, in its order."""
    return [int(tensor.size) for tensor in cache_config.kv_cache_tensors]
