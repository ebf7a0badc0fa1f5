"""Tensors over the arena in place of those that vLLM allocates for its KV cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True, slots=True)
class Shaped:
    """A layer's tensor that vLLM allocates in its final shape: ``(blocks, ...)``, or
    ``(2, blocks, ...)`` with K and V apart. It lies as its shape says, ``start_bytes`` into the
    arena; or, with a ``block_stride_bytes``, in a part of each block: K and V side by side.
    """

    size_bytes: int
    num_blocks: int
    start_bytes: int
    block_stride_bytes: int | None = None

    def fits(self, shape: Sequence[int], dtype: torch.dtype) -> bool:
        """Whether it is this tensor that vLLM allocates."""
        return math.prod(shape) * dtype.itemsize == self.size_bytes and self.num_blocks in shape[:2]

    def view(self, raw: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The tensor of this shape over the arena's bytes."""
        if self.block_stride_bytes is None:
            return raw[self.start_bytes :][: self.size_bytes].view(dtype).view(shape)
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        blocks = 0 if shape[0] == self.num_blocks else 1
        strides[:blocks] = strides[blocks : 2 * blocks]  # V follows K within the block
        strides[blocks] = self.block_stride_bytes // dtype.itemsize
        return raw.view(dtype).as_strided(shape, strides, self.start_bytes // dtype.itemsize)


class AnswerZeros(TorchFunctionMode):  # type: ignore[misc]
    """Answers each ``torch.zeros`` of the KV cache, in this order, with bytes of the arena.

    An ``int`` is an allocation of so many bytes (int8), which follows the one before; a ``range``
    one of those bytes.
    """

    def __init__(self, allocations: Sequence[int | range | Shaped], tensor: torch.Tensor) -> None:
        super().__init__()
        self.left = list(allocations)
        self._tensor = tensor
        self._start = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.zeros and self.left:
            answer = self._answer(args, kwargs)
            if answer is not None:
                return answer
        return func(*args, **kwargs)

    def _answer(self, args: Any, kwargs: Any) -> torch.Tensor | None:
        size = args[0] if len(args) == 1 else args or kwargs.get("size")
        shape = (size,) if isinstance(size, int) else tuple(size)
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        wanted = self.left[0]
        if isinstance(wanted, Shaped):
            if not wanted.fits(shape, dtype):
                return None
            self.left.pop(0)
            return wanted.view(self._tensor, shape, dtype)
        place = wanted
        if isinstance(place, int):
            place = range(self._start, self._start + place)
        if dtype != torch.int8 or shape != (len(place),):
            return None
        self.left.pop(0)
        self._start = place.stop
        return self._tensor[place.start : place.stop]
