"""Where vLLM 0.24 says that its KV cache's tensors lie.

Each ``KVCacheTensor`` is an allocation of its own, blocks one after the other, which one layer of
each group uses; or, with a ``block_stride``, a place in every block of one common allocation. The
second form is what vLLM calls packed and what kvcached calls block-outermost; both model runners
honour it for every model.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from kvcached.errors import EngineError

BACKENDS = frozenset({"CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN"})
"""Attention backends that were seen to give right outputs with these strides."""


def refusal(backend: Any) -> str | None:
    """Why an attention backend cannot have its KV cache block-outermost; None where it can."""
    if backend.get_name() not in BACKENDS:
        return "not tried with kvcached yet"
    try:
        order = backend.get_kv_cache_stride_order()
    except (AttributeError, NotImplementedError):
        return None  # then the tensor's shape says how it lies
    # The views that vLLM makes of packed tensors leave the order of dimensions out of account.
    if tuple(order) != tuple(range(len(order))):
        return "with a KV cache layout of its own, such as VLLM_KV_CACHE_LAYOUT=HND"
    return None


def block_bytes(cache_config: Any) -> int:
    """Bytes of one block, all layers, K and V."""
    return sum(_parts(cache_config))


def block_outermost(cache_config: Any) -> Any:
    """A copy of the configuration whose tensors lie block-outermost: all layers of a block
    together, so that one page is one handle.
    """
    parts = _parts(cache_config)
    stride = sum(parts)
    packed = copy.copy(cache_config)
    packed.kv_cache_tensors = [
        replace(
            tensor,
            size=stride * cache_config.num_blocks,
            offset=sum(parts[:index]),
            block_stride=stride,
        )
        for index, tensor in enumerate(cache_config.kv_cache_tensors)
    ]
    return packed


def _parts(cache_config: Any) -> list[int]:
    """Bytes of one block in each tensor."""
    parts = []
    for tensor in cache_config.kv_cache_tensors:
        if tensor.block_stride or tensor.offset:
            raise EngineError("kvcached: this KV cache is packed by vLLM itself: not supported yet")
        if tensor.size % cache_config.num_blocks:
            raise EngineError(
                f"kvcached: a KV cache tensor of {tensor.size} bytes does not hold "
                f"{cache_config.num_blocks} whole blocks"
            )
        parts.append(tensor.size // cache_config.num_blocks)
    return parts
