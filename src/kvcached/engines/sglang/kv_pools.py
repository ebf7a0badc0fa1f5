"""SGLang's KV caches, given tensors over an arena."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from kvcached.engines.sglang import buffers, build, engine
from kvcached.errors import EngineError


def create_mha(pool: Any, k_shape: tuple[int, ...], v_shape: tuple[int, ...]) -> None:
    """Gives an ``MHATokenToKVPool`` its ``k_buffer`` and ``v_buffer``, a tensor a layer; the shapes
    are those of a slot.
    """
    shapes = [tuple(k_shape)] * pool.layer_num + [tuple(v_shape)] * pool.layer_num
    memory = buffers.create(build.current(), shapes, pool.store_dtype, pool.size, pool.page_size)
    pool.k_buffer = memory.buffers[: pool.layer_num]
    pool.v_buffer = memory.buffers[pool.layer_num :]
    engine.attach(pool, memory)


def create_mla(pool: Any, shape: tuple[int, ...]) -> None:
    """Gives an ``MLATokenToKVPool`` its ``kv_buffer``, a tensor a layer."""
    memory = buffers.create(
        build.current(), [shape] * pool.layer_num, pool.store_dtype, pool.size, pool.page_size
    )
    pool.kv_buffer = memory.buffers
    engine.attach(pool, memory)


class _AnswerZeros(TorchFunctionMode):  # type: ignore[misc]
    """Answers each ``torch.zeros`` of a KV cache's layers, all with so many rows, with the next of
    its tensors, which are made when the first is asked for: ``tensors`` of them, of its shape.
    """

    def __init__(self, tensors: int, size: int, block_tokens: int) -> None:
        super().__init__()
        self._tensors = tensors
        self._size = size
        self._block_tokens = block_tokens
        self.memory: buffers.KvMemory | None = None
        self.given = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        shape = args[0] if len(args) == 1 else None
        rows = self._size + self._block_tokens
        if func is not torch.zeros or not isinstance(shape, tuple) or shape[0] != rows:
            return func(*args, **kwargs)
        if self.memory is None:
            shapes, dtype = [shape[1:]] * self._tensors, kwargs["dtype"]
            self.memory = buffers.create(
                build.current(), shapes, dtype, self._size, self._block_tokens
            )
        buffer = self.memory.buffers[self.given] if self.given < self._tensors else None
        if buffer is None or tuple(buffer.shape) != shape:
            raise EngineError(f"kvcached does not support a KV cache with tensors of {shape} yet")
        self.given += 1
        return buffer

    def attach_to(self, pool: Any) -> None:
        """Raises EngineError where SGLang did not ask for every tensor."""
        if self.memory is None or self.given != self._tensors:
            raise EngineError(
                f"kvcached: SGLang allocated {self.given} tensors of its KV cache, {self._tensors} "
                "were expected"
            )
        engine.attach(pool, self.memory)


def answer_mha_zeros(original: Any) -> Any:
    """``MHATokenToKVPool._create_buffers`` of versions that do more in it than allocate."""

    @functools.wraps(original)
    def _create_buffers(self: Any) -> None:
        with _AnswerZeros(2 * self.layer_num, self.size, self.page_size) as answer:
            original(self)
        answer.attach_to(self)

    return _create_buffers


def answer_mla_zeros(original: Any) -> Any:
    """``MLATokenToKVPool.__init__`` of versions that allocate in the constructor itself."""

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(original).bind(self, *args, **kwargs).arguments
        with _AnswerZeros(given["layer_num"], given["size"], given["page_size"]) as answer:
            original(self, *args, **kwargs)
        answer.attach_to(self)

    return __init__


def create_mla_buffers(original: Any) -> Any:
    """``MLATokenToKVPool._create_buffers``."""

    @functools.wraps(original)
    def _create_buffers(self: Any) -> None:
        create_mla(self, (1, self.kv_cache_dim))

    return _create_buffers
