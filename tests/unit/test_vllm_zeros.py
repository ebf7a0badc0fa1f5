"""Tensors that an old vLLM allocates in their final shape, answered with bytes of an arena."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from kvcached.engines.vllm import tensors_0_8, tensors_0_13  # noqa: E402
from kvcached.engines.vllm.zeros import AnswerZeros  # noqa: E402
from kvcached.errors import EngineError  # noqa: E402
from kvcached.layout import BlockLayout  # noqa: E402


@dataclass
class Tensor8:
    """``KVCacheTensor`` of vLLM 0.8."""

    size: int


@dataclass
class Config8:
    """``KVCacheConfig`` of vLLM 0.8."""

    num_blocks: int
    tensors: dict[str, Tensor8]
    kv_cache_groups: list[Any] = field(default_factory=list)


def backend(planes: int, inner: tuple[int, ...]) -> Any:
    def shape(num_blocks: int, *_: int) -> tuple[int, ...]:
        return (2, num_blocks, *inner) if planes == 2 else (num_blocks, *inner)

    return SimpleNamespace(get_kv_cache_shape=shape, get_name=lambda: "TEST")


def config(layers: int, blocks: int, part: int) -> Config8:
    names = [f"layer{n}" for n in range(layers)]
    spec = SimpleNamespace(page_size_bytes=part, block_size=16, num_kv_heads=2, head_size=8)
    group = SimpleNamespace(layer_names=names, kv_cache_spec=spec)
    return Config8(blocks, {name: Tensor8(part * blocks) for name in names}, [group])


@given(
    layers=st.integers(1, 4),
    blocks=st.integers(3, 12),
    planes=st.sampled_from([1, 2]),
    inner=st.sampled_from([(4, 2, 8), (16, 4), (8, 1, 4)]),
    per_page=st.integers(1, 4),
    together=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_each_block_of_each_layer_lies_on_its_page_and_nowhere_else(
    layers: int, blocks: int, planes: int, inner: tuple[int, ...], per_page: int, together: bool
) -> None:
    part = planes * math.prod(inner) * 2
    plain = config(layers, blocks, part)
    used = backend(planes, inner)
    spec = plain.kv_cache_groups[0].kv_cache_spec
    assert tensors_0_8.planes(used, spec, "auto") == planes
    if together:
        runs: tuple[int, ...] = (tensors_0_8.block_bytes(plain),)
        placed = tensors_0_8.block_outermost(plain)
    else:
        runs = tensors_0_8.runs(plain, dict.fromkeys(plain.tensors, planes))
        placed = tensors_0_8.layer_outermost(plain, -(-blocks // per_page) * per_page)
    layout = BlockLayout.layer_outermost(blocks, runs, per_page, 1)
    arena = torch.zeros(layout.size_bytes, dtype=torch.int8)
    tensors = []
    with AnswerZeros(tensors_0_8.allocations(placed), arena) as answer:
        for name in plain.tensors:
            count = placed.tensors[name].size // part
            shape = used.get_kv_cache_shape(count)
            tensors.append(torch.zeros(shape, dtype=torch.float16, device="cpu"))
            assert torch.zeros(3).sum() == 0, "others are not answered"
    assert not answer.left
    owners = torch.full((layout.size_bytes,), -1)
    for layer, tensor in enumerate(tensors):
        for block in range(blocks):
            arena.zero_()
            (tensor[:, block] if planes == 2 else tensor[block]).fill_(1)
            (written,) = (arena.view(torch.float16) != 0).nonzero(as_tuple=True)
            assert len(written) * 2 == part
            places = torch.cat([2 * written, 2 * written + 1])
            inside = torch.zeros_like(places, dtype=torch.bool)
            for region in range(len(layout.regions)):
                own = layout.byte_range(block, region)
                inside |= (places >= own.start) & (places < own.stop)
            assert inside.all(), (layer, block)
            assert (owners[places] == -1).all(), "two blocks share bytes"
            owners[places] = layer * blocks + block


def test_an_allocation_of_another_size_is_left_alone() -> None:
    arena = torch.zeros(64, dtype=torch.int8)
    with AnswerZeros([32], arena) as answer:
        assert torch.zeros(16, dtype=torch.int8).data_ptr() != arena.data_ptr()
        assert torch.zeros(32, dtype=torch.uint8).data_ptr() != arena.data_ptr()
        assert answer.left == [32]
        assert torch.zeros((32,), dtype=torch.int8).data_ptr() == arena.data_ptr()
    assert not answer.left


def test_a_version_without_strides_has_its_layers_apart() -> None:
    tensors = [SimpleNamespace(size=64 * 5, shared_by=["a"]), SimpleNamespace(size=32 * 5)]
    cache_config = SimpleNamespace(num_blocks=5, kv_cache_tensors=tensors)
    assert tensors_0_13.block_bytes(cache_config) == 96
    assert tensors_0_13.allocations(cache_config) == [320, 160]
    assert "no strides" in tensors_0_13.refusal(None)
    with pytest.raises(EngineError):
        tensors_0_13.block_outermost(cache_config)
