"""Where vLLM 0.8 lays its KV cache: a tensor for each layer, allocated in its final shape.

The shape is the attention backend's: ``(2, blocks, ...)`` with K and V apart, or ``(blocks, ...)``.
The model runner binds what it gets from ``torch.zeros`` as it is, so its strides are free.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kvcached.engines.vllm.zeros import Shaped
from kvcached.errors import EngineError

BACKENDS: frozenset[str] = frozenset()
"""Attention backends that were seen to give right outputs with block-outermost strides: none was
run with this version, so layers lie as vLLM lays them. ``KVCACHED_LAYOUT=block`` is for trying.
"""

_BLOCKS = 1_000_003  # a number that no other dimension has
_STRIDE = "kvcached_block_stride"  # noted on a configuration: layers lie together, in such blocks


def refusal(backend: Any) -> str | None:
    """Why an attention backend cannot have its KV cache block-outermost; None where it can."""
    return None


def planes(backend: Any, spec: Any, cache_dtype: str) -> int:
    """The runs of blocks that one layer's tensor consists of: two if K and V lie apart."""
    shape = backend.get_kv_cache_shape(_BLOCKS, spec.block_size, spec.num_kv_heads, spec.head_size)
    axis = list(shape).index(_BLOCKS)
    if axis > 1:
        raise EngineError(
            f"kvcached: {backend.get_name()} lays its KV cache as {tuple(shape)}: not supported"
        )
    return math.prod(shape[:axis])


def is_packed(cache_config: Any) -> bool:
    """Whether vLLM itself lays all layers of a block together."""
    return False


def block_bytes(cache_config: Any) -> int:
    """Bytes of one block, all layers, K and V."""
    return sum(_parts(cache_config).values())


def block_outermost(cache_config: Any) -> Any:
    """A copy of the configuration that says: all layers of a block lie together."""
    changed = copy.copy(cache_config)
    setattr(changed, _STRIDE, block_bytes(cache_config))
    return changed


def runs(cache_config: Any, planes_of: Mapping[str, int]) -> tuple[int, ...]:
    """Bytes of one block in each run of blocks where layers are outermost, in the order of their
    addresses. ``planes_of`` says how many runs a layer's tensor consists of.
    """
    found: list[int] = []
    for name, part in _parts(cache_config).items():
        found += [part // planes_of[name]] * planes_of[name]
    return tuple(found)


def layer_outermost(cache_config: Any, num_blocks: int) -> Any:
    """A copy of the configuration whose tensors hold ``num_blocks`` blocks each: as many as whole
    pages have. The model runner counts the blocks of a tensor by its size.
    """
    changed = copy.copy(cache_config)
    changed.tensors = {
        name: replace(cache_config.tensors[name], size=part * num_blocks)
        for name, part in _parts(cache_config).items()
    }
    return changed


def allocations(cache_config: Any) -> list[Shaped]:
    """What the model runner allocates for it, in its order, and where it is to lie."""
    stride = getattr(cache_config, _STRIDE, None)
    found, start = [], 0
    for name, part in _parts(cache_config).items():
        size = int(cache_config.tensors[name].size)
        found.append(Shaped(size, size // part, start, stride))
        start += size if stride is None else part
    return found


def _parts(cache_config: Any) -> dict[str, int]:
    """Bytes of one block in each layer, in the order in which they are allocated."""
    return {
        name: int(group.kv_cache_spec.page_size_bytes)
        for group in cache_config.kv_cache_groups
        for name in group.layer_names
    }
