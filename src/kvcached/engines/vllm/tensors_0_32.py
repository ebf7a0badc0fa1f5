"""Where vLLM 0.32 says that its KV cache lies: a start, a stride a layer, a stride a block."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kvcached.errors import EngineError

BACKENDS = frozenset({"CPU_ATTN"})
"""Attention backends that were seen to give right outputs with block-outermost strides."""

# Layouts of vLLM's in which a layer's blocks are not one run of whole blocks.
_SCATTERED = frozenset({"LHBNC", "BHLNC"})


def refusal(backend: Any) -> str | None:
    """Why an attention backend cannot have its KV cache block-outermost; None where it can."""
    return None


def planes(backend: Any, spec: Any, cache_dtype: str) -> int:
    """The runs of blocks that one layer consists of where layers are outermost."""
    return 1


def is_packed(cache_config: Any) -> bool:
    """Whether vLLM itself lays all layers of a block together."""
    layout = getattr(cache_config, "kv_cache_layout", None)
    if layout in _SCATTERED:
        raise EngineError(
            f"kvcached does not support vLLM's KV cache layout {layout}: set "
            "VLLM_KV_CACHE_LAYOUT=LBNHC or LBHNC"
        )
    return any(
        tensor.layer_stride < tensor.block_stride and len(tensor.layers) > 1
        for tensor in cache_config.kv_cache_tensors
    )


def block_bytes(cache_config: Any) -> int:
    """Bytes of one block, all layers, K and V."""
    if is_packed(cache_config):
        (stride,) = {int(tensor.block_stride) for tensor in cache_config.kv_cache_tensors}
        return stride
    return sum(_regions(cache_config).values())


def block_outermost(cache_config: Any) -> Any:
    """A copy of the configuration whose tensors lie block-outermost: all layers of a block
    together, so that one page is one handle. vLLM honours the strides that its tensors state.
    """
    if is_packed(cache_config):
        return copy.copy(cache_config)
    starts, size = _end_to_end(_regions(cache_config), 1)
    return _moved(cache_config, starts, size * cache_config.num_blocks, lambda _: size)


def runs(cache_config: Any, planes_of: Mapping[str, int]) -> tuple[int, ...]:
    """Bytes of one block in each run of blocks where layers are outermost, in the order of their
    addresses.
    """
    regions = _regions(cache_config)
    return tuple(regions[start] for start in sorted(regions))


def layer_outermost(cache_config: Any, num_blocks: int) -> Any:
    """A copy of the configuration in which every layer has room for ``num_blocks`` blocks: as many
    as whole pages have.
    """
    starts, size = _end_to_end(_regions(cache_config), num_blocks)
    return _moved(cache_config, starts, size, lambda tensor: int(tensor.block_stride))


def allocations(cache_config: Any) -> list[int]:
    """The size in bytes of the one buffer that vLLM allocates for it."""
    return [int(tensor.size) for tensor in cache_config.kv_cache_tensors[:1]]


def _end_to_end(regions: Mapping[int, int], blocks: int) -> tuple[dict[int, int], int]:
    """Where each region starts if each holds so many blocks and they lie end to end; their sum."""
    starts: dict[int, int] = {}
    size = 0
    for start in sorted(regions):
        starts[start] = size
        size += regions[start] * blocks
    return starts, size


def _moved(cache_config: Any, starts: Mapping[int, int], size: int, block_stride: Any) -> Any:
    changed = copy.copy(cache_config)
    changed.kv_cache_tensors = [
        replace(
            tensor,
            size=size,
            offset=starts[tensor.offset],
            layer_stride=(
                starts[tensor.offset + tensor.layer_stride] - starts[tensor.offset]
                if len(tensor.layers) > 1
                else tensor.block_stride
            ),
            block_stride=block_stride(tensor),
        )
        for tensor in cache_config.kv_cache_tensors
    ]
    return changed


def _regions(cache_config: Any) -> dict[int, int]:
    """Start and block stride of each layer's region in vLLM's layer-outermost buffer. Groups that
    overlay each other share regions.
    """
    regions: dict[int, int] = {}
    for tensor in cache_config.kv_cache_tensors:
        for index in range(len(tensor.layers)):
            start = tensor.offset + index * tensor.layer_stride
            if regions.setdefault(start, tensor.block_stride) != tensor.block_stride:
                raise EngineError("kvcached: layers of different size share memory: not supported")
    return regions
