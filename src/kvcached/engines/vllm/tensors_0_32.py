"""Where vLLM 0.32 says that its KV cache lies: a start, a stride a layer, a stride a block."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from kvcached.errors import EngineError

BACKENDS = frozenset({"CPU_ATTN"})
"""Attention backends that were seen to give right outputs with these strides."""


def refusal(backend: Any) -> str | None:
    """Why an attention backend cannot have its KV cache block-outermost; None where it can."""
    return None if backend.get_name() in BACKENDS else "not tried with kvcached yet"


def block_bytes(cache_config: Any) -> int:
    """Bytes of one block, all layers, K and V."""
    return sum(_regions(cache_config).values())


def block_outermost(cache_config: Any) -> Any:
    """A copy of the configuration whose tensors lie block-outermost: all layers of a block
    together, so that one page is one handle. vLLM honours the strides that its tensors state.
    """
    offsets: dict[int, int] = {}
    size = 0
    for start, stride in sorted(_regions(cache_config).items()):
        offsets[start] = size
        size += stride
    packed = copy.copy(cache_config)
    packed.kv_cache_tensors = [
        replace(
            tensor,
            offset=offsets[tensor.offset],
            layer_stride=(
                offsets[tensor.offset + tensor.layer_stride] - offsets[tensor.offset]
                if len(tensor.layers) > 1
                else tensor.block_stride
            ),
            block_stride=size,
        )
        for tensor in cache_config.kv_cache_tensors
    ]
    return packed


def _regions(cache_config: Any) -> dict[int, int]:
    """Start and block stride of each layer's region in vLLM's layer-outermost buffer. Groups that
    overlay each other share regions.
    """
    regions: dict[int, int] = {}
    for tensor in cache_config.kv_cache_tensors:
        if tensor.layer_stride < tensor.block_stride and len(tensor.layers) > 1:
            raise EngineError("kvcached: this KV cache is packed by vLLM itself: not supported yet")
        for index in range(len(tensor.layers)):
            start = tensor.offset + index * tensor.layer_stride
            if regions.setdefault(start, tensor.block_stride) != tensor.block_stride:
                raise EngineError("kvcached: layers of different size share memory: not supported")
    return regions
