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
    """Answers the ``torch.zeros`` of a KV cache's layers, all of one shape, with its tensors."""

    def __init__(self, layers: int, size: int, block_tokens: int) -> None:
        super().__init__()
        self._layers = layers
        self._rows = size + block_tokens
        self._size = size
        self._block_tokens = block_tokens
        self.memory: buffers.KvMemory | None = None
        self.given = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        shape = args[0] if len(args) == 1 else None
        if func is not torch.zeros or not isinstance(shape, tuple) or shape[0] != self._rows:
            return func(*args, **kwargs)
        if self.memory is None:
            self.memory = buffers.create(
                build.current(),
                [shape[1:]] * self._layers,
                kwargs["dtype"],
                self._size,
                self._block_tokens,
            )
        self.given += 1
        return self.memory.buffers[self.given - 1]


def answer_mla_zeros(original: Any) -> Any:
    """``MLATokenToKVPool.__init__`` of versions that allocate in the constructor itself."""

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(original).bind(self, *args, **kwargs).arguments
        layers = given["layer_num"]
        with _AnswerZeros(layers, given["size"], given["page_size"]) as answer:
            original(self, *args, **kwargs)
        if answer.memory is None or answer.given != layers:
            raise EngineError(
                f"kvcached: SGLang allocated {answer.given} layers of its KV cache, {layers} were "
                "expected"
            )
        engine.attach(self, answer.memory)

    return __init__
