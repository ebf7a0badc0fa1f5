"""Tensors over an arena. The only module of the core that knows torch, imported when first used.

None of this touches the memory: views may cover places where nothing is mapped yet. Reading or
writing there ends the process with SIGSEGV (on a GPU: with an illegal address), by design.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvcached.errors import InvalidArgumentError
from kvcached.layout import BlockLayout
from kvcached.vmm_ops import Arena

if TYPE_CHECKING:
    import torch


def int8_tensor(arena: Arena, offset_bytes: int = 0, nbytes: int | None = None) -> torch.Tensor:
    """Bytes of the arena as a one-dimensional int8 tensor on its device.

    The tensor and all its views keep the arena alive. ``nbytes`` defaults to the rest of the
    arena. Raises InvalidArgumentError where the range is empty or leaves the arena.
    """
    from torch.utils.dlpack import from_dlpack

    size = arena.size - offset_bytes if nbytes is None else nbytes
    return from_dlpack(arena.span(offset_bytes, size))


def block_view(
    buffer: torch.Tensor,
    layout: BlockLayout,
    dtype: torch.dtype,
    shape: Sequence[int],
    *,
    region: int = 0,
    inner_offset_bytes: int = 0,
    strides: Sequence[int] | None = None,
) -> torch.Tensor:
    """A tensor ``[num_blocks, *shape]`` of ``dtype`` over one layer's part of every block.

    ``buffer`` is the int8 tensor of the whole arena. The part starts ``inner_offset_bytes`` into
    the block's bytes of that region (layer l of a block-outermost layout: l times a layer's
    bytes). ``strides`` are those of ``shape`` in elements; dense if None. Raises
    InvalidArgumentError where the part leaves the block or is not aligned to ``dtype``.
    """
    place = layout.regions[region]
    inner = list(strides) if strides is not None else _dense_strides(shape)
    if len(inner) != len(shape) or min(shape, default=1) < 1 or min(inner, default=0) < 0:
        raise InvalidArgumentError(f"strides {inner} do not belong to shape {list(shape)}")
    item = dtype.itemsize
    last = sum((size - 1) * stride for size, stride in zip(shape, inner, strict=True))
    end = inner_offset_bytes + (last + 1) * item
    if inner_offset_bytes < 0 or end > place.block_bytes:
        raise InvalidArgumentError(
            f"bytes {inner_offset_bytes} to {end} leave a block of {place.block_bytes} bytes"
        )
    start = place.offset_bytes + inner_offset_bytes
    if start % item or place.block_stride_bytes % item:
        raise InvalidArgumentError(
            f"offset {start} and block stride {place.block_stride_bytes} must be multiples of "
            f"{item} bytes for {dtype}"
        )
    return buffer.view(dtype).as_strided(
        (layout.num_blocks, *shape),
        (place.block_stride_bytes // item, *inner),
        buffer.storage_offset() // item + start // item,
    )


def _dense_strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
