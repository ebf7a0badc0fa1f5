"""Where vLLM 0.24 says that its KV cache's tensors lie.

Each ``KVCacheTensor`` is an allocation of its own, blocks one after the other, which one layer of
each group uses; or, with a ``block_stride``, a place in every block of one common allocation. The
second form is what vLLM calls packed and what kvcached calls block-outermost; both model runners
honour it for every model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvcached.errors import EngineError

BACKENDS = frozenset({"CPU_ATTN", "FLASHINFER", "FLASH_ATTN", "TRITON_ATTN"})
"""Attention backends that were seen to give right outputs with block-outermost strides."""

_BLOCKS = 1_000_003  # a number that no other dimension has


def refusal(backend: Any) -> str | None:
    """Why an attention backend cannot have its KV cache block-outermost; None where it can."""
    order = _stride_order(backend)
    # The views that vLLM makes of packed tensors leave the order of dimensions out of account.
    if order is not None and order != tuple(range(len(order))):
        return "a KV cache layout of its own, such as VLLM_KV_CACHE_LAYOUT=HND"
    return None


def planes(backend: Any, spec: Any, cache_dtype: str) -> int:
    """The runs of blocks that one layer's tensor consists of where layers are outermost: two if K
    and V lie apart.
    """
    shape = backend.get_kv_cache_shape(
        _BLOCKS, spec.block_size, spec.num_kv_heads, spec.head_size, cache_dtype_str=cache_dtype
    )
    physical = [shape[axis] for axis in _stride_order(backend) or range(len(shape))]
    return math.prod(physical[: physical.index(_BLOCKS)])


def _stride_order(backend: Any) -> tuple[int, ...] | None:
    """The order in memory of a tensor's dimensions; None where it lies as its shape says."""
    try:
        return tuple(backend.get_kv_cache_stride_order())
    except (AttributeError, NotImplementedError):
        return None


def is_packed(cache_config: Any) -> bool:
    """Whether vLLM itself lays all layers of a block together."""
    return any(tensor.block_stride for tensor in cache_config.kv_cache_tensors)


def block_bytes(cache_config: Any) -> int:
    """Bytes of one block, all layers, K and V."""
    if is_packed(cache_config):
        return int(cache_config.kv_cache_tensors[0].block_stride)
    return sum(_parts(cache_config))


def groups(cache_config: Any, most: int, least_bytes: int) -> int:
    """Into how many groups of layers a block can be divided: ``most`` at most, all of one size, of
    ``least_bytes`` or more in each.
    """
    if is_packed(cache_config):
        return 1
    parts = _parts(cache_config)

    def fits(count: int) -> bool:
        return (
            len(parts) % count == 0
            and sum(parts) // count >= least_bytes
            and len(set(_strides(parts, count))) == 1
        )

    return next((count for count in range(most, 1, -1) if fits(count)), 1)


def _strides(parts: Sequence[int], count: int) -> list[int]:
    """Bytes of a block in each of ``count`` groups of layers."""
    each = len(parts) // count
    return [sum(parts[start : start + each]) for start in range(0, len(parts), each)]


def grouped(cache_config: Any, count: int, num_blocks: int) -> Any:
    """A copy of the configuration whose tensors lie in ``count`` runs of ``num_blocks`` blocks, one
    for each group of layers: a layer's blocks are nearer to each other than with all together.

    vLLM has one stride for all blocks, that of the layers' specifications, and counts blocks by a
    tensor's size. A tensor begins at its place in the first block of its run, so it has room for
    one block less than the run.
    """
    parts = _parts(cache_config)
    each, (stride,) = len(parts) // count, set(_strides(parts, count))
    starts = [
        index // each * stride * num_blocks + sum(parts[index - index % each : index])
        for index in range(len(parts))
    ]
    changed = _with(
        cache_config,
        [
            replace(tensor, size=stride * (num_blocks - 1), offset=start)
            for tensor, start in zip(cache_config.kv_cache_tensors, starts, strict=True)
        ],
    )
    changed.kv_cache_groups = [
        replace(group, kv_cache_spec=_padded(group.kv_cache_spec, stride))
        for group in cache_config.kv_cache_groups
    ]
    return changed


def _padded(spec: Any, stride: int) -> Any:
    several = getattr(spec, "kv_cache_specs", None)
    if several is None:
        return replace(spec, page_size_padded=stride)
    padded = {name: _padded(one, stride) for name, one in several.items()}
    return replace(spec, kv_cache_specs=padded)


def block_outermost(cache_config: Any) -> Any:
    """A copy of the configuration whose tensors lie block-outermost: all layers of a block
    together, so that one page is one handle.
    """
    if is_packed(cache_config):
        return copy.copy(cache_config)
    parts = _parts(cache_config)
    stride = sum(parts)
    return _with(
        cache_config,
        [
            replace(
                tensor,
                size=stride * cache_config.num_blocks,
                offset=sum(parts[:index]),
                block_stride=stride,
            )
            for index, tensor in enumerate(cache_config.kv_cache_tensors)
        ],
    )


def runs(cache_config: Any, planes_of: Mapping[str, int]) -> tuple[int, ...]:
    """Bytes of one block in each run of blocks where layers are outermost, in the order of their
    addresses. ``planes_of`` says how many runs a layer's tensor consists of.
    """
    found: list[int] = []
    for tensor, part in zip(cache_config.kv_cache_tensors, _parts(cache_config), strict=True):
        apart = {planes_of[name] for name in tensor.shared_by if name in planes_of}
        if len(apart) != 1 or part % max(apart):
            raise EngineError(
                f"kvcached: layers {tensor.shared_by} share {part} bytes a block and lie in "
                f"{sorted(apart)} parts: not supported"
            )
        (count,) = apart
        found += [part // count] * count
    return tuple(found)


def layer_outermost(cache_config: Any, num_blocks: int) -> Any:
    """A copy of the configuration whose tensors hold ``num_blocks`` blocks each: as many as whole
    pages have. The model runners count the blocks of a tensor by its size.
    """
    parts = _parts(cache_config)
    return _with(
        cache_config,
        [
            replace(tensor, size=part * num_blocks)
            for tensor, part in zip(cache_config.kv_cache_tensors, parts, strict=True)
        ],
    )


def allocations(cache_config: Any) -> list[int] | list[range]:
    """What the model runners allocate for it, in their order: sizes in bytes, end to end, or which
    bytes.
    """
    tensors = cache_config.kv_cache_tensors
    sizes = [int(tensor.size) for tensor in tensors]
    if is_packed(cache_config):
        return sizes[:1]
    starts = [int(tensor.offset) for tensor in tensors]
    if not any(starts):
        return sizes
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def _with(cache_config: Any, tensors: list[Any]) -> Any:
    changed = copy.copy(cache_config)
    changed.kv_cache_tensors = tensors
    return changed


def _parts(cache_config: Any) -> list[int]:
    """Bytes of one block in each tensor."""
    parts = []
    for tensor in cache_config.kv_cache_tensors:
        if tensor.size % cache_config.num_blocks:
            raise EngineError(
                f"kvcached: a KV cache tensor of {tensor.size} bytes does not hold "
                f"{cache_config.num_blocks} whole blocks"
            )
        parts.append(tensor.size // cache_config.num_blocks)
    return parts
