"""SGLang's KV caches, given tensors over an arena."""

from __future__ import annotations

from typing import Any

from kvcached.engines.sglang import buffers, build, engine


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
