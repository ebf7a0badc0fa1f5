"""Where the KV cache's tensors lie, of each version of vLLM: computed without vLLM, seen as views.

The configurations are stand-ins with the fields of the versions' own classes; the engine tests run
the real ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcached.engines.vllm import tensors_0_24, tensors_0_32
from kvcached.errors import EngineError
from kvcached.layout import BlockId, BlockLayout


@dataclass
class Tensor24:
    """``KVCacheTensor`` of vLLM 0.24."""

    size: int
    shared_by: list[str]
    offset: int = 0
    block_stride: int = 0


@dataclass
class Tensor32:
    """``KVCacheTensor`` of vLLM 0.32."""

    size: int
    layers: list[str]
    offset: int
    layer_stride: int
    block_stride: int


@dataclass
class Spec:
    """What all layers of a group are, as far as the tensors' places depend on it."""

    bytes: int
    page_size_padded: int | None = None


@dataclass
class Group:
    layer_names: list[str]
    kv_cache_spec: Spec


@dataclass
class Config:
    num_blocks: int
    kv_cache_tensors: list[Any] = field(default_factory=list)
    kv_cache_groups: list[Group] = field(default_factory=list)
    kv_cache_layout: str | None = None


# Bytes of a block in each layer, the blocks, and how many groups share each tensor.
SIZES = st.lists(st.integers(1, 64).map(lambda n: 16 * n), min_size=1, max_size=12)
SHAPES = st.tuples(SIZES, st.integers(1, 9), st.integers(1, 3))


def config_24(sizes: list[int], blocks: int, groups: int) -> Config:
    return Config(
        blocks,
        [
            Tensor24(size * blocks, [f"g{group}.{layer}" for group in range(groups)])
            for layer, size in enumerate(sizes)
        ],
    )


def places_24(config: Config) -> dict[str, list[range]]:
    """The bytes of each layer's blocks, as vLLM 0.24's model runners make views of packed tensors:
    ``raw.view(-1, block_stride)[:, offset : offset + bytes of the layer's block]``.
    """
    places = {}
    strides = {tensor.block_stride for tensor in config.kv_cache_tensors}
    assert len(strides) == 1
    (stride,) = strides
    ends = sorted({tensor.offset for tensor in config.kv_cache_tensors} | {stride})
    for tensor in config.kv_cache_tensors:
        assert tensor.size == config.kv_cache_tensors[0].size, (
            "one allocation: the first one's size"
        )
        assert tensor.size == stride * config.num_blocks
        end = next(end for end in ends if end > tensor.offset)
        for name in tensor.shared_by:
            places[name] = [
                range(block * stride + tensor.offset, block * stride + end)
                for block in range(config.num_blocks)
            ]
    return places


@given(SHAPES)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_0_24_every_byte_of_a_block_belongs_to_one_layer(
    shape: tuple[list[int], int, int],
) -> None:
    sizes, blocks, groups = shape
    before = config_24(*shape)
    packed = tensors_0_24.block_outermost(before)
    block_bytes = tensors_0_24.block_bytes(before)
    assert block_bytes == sum(sizes)
    places = places_24(packed)
    owner = [-1] * (block_bytes * blocks)
    for layer, size in enumerate(sizes):
        for block, place in enumerate(places[f"g0.{layer}"]):
            assert len(place) == size
            assert place.start // block_bytes == (place.stop - 1) // block_bytes == block
            assert all(owner[byte] == -1 for byte in place), "layers overlap"
            owner[place.start : place.stop] = [layer] * size
        for group in range(1, groups):  # groups have block ids of their own: they share the bytes
            assert places[f"g{group}.{layer}"] == places[f"g0.{layer}"]
    assert -1 not in owner, "a byte of a page that nobody uses"
    assert before == config_24(*shape), "the engine's own configuration is left as it was"


NUMBERS = (st.integers(1, most) for most in (5, 4, 24, 40, 8))


@given(*NUMBERS)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_0_24_groups_of_layers_lie_on_their_pages(
    each: int, runs: int, size: int, blocks: int, per_page: int
) -> None:
    """Where vLLM's views have a block, with the stride of the specifications and counted by the
    tensor's size, the layout has it; and no view ends outside of the arena.
    """
    layers, stride = each * runs, each * size
    before = Config(
        blocks,
        [Tensor24(size * blocks, [f"l{n}"]) for n in range(layers)],
        [Group([f"l{n}" for n in range(layers)], Spec(size))],
    )
    assert tensors_0_24.groups(before, runs, stride) == runs
    assert tensors_0_24.groups(before, runs, stride * runs + 1) == 1
    in_pages = -(-(blocks + 1) // per_page) * per_page
    layout = BlockLayout.layer_outermost(in_pages, [stride] * runs, per_page, 1)
    after = tensors_0_24.grouped(before, runs, in_pages)
    (group,) = after.kv_cache_groups
    assert group.kv_cache_spec.page_size_padded == stride
    assert before.kv_cache_groups[0].kv_cache_spec.page_size_padded is None
    allocated = tensors_0_24.allocations(after)
    places = [place if isinstance(place, range) else range(place) for place in allocated]
    assert max(place.stop for place in places) <= layout.size_bytes
    for layer, place in enumerate(places):
        assert len(place) % stride == 0 and len(place) // stride >= blocks
        for block in range(blocks):
            first = place.start + block * stride
            whole = layout.byte_range(BlockId(block), layer // each)
            assert first == whole.start + layer % each * size and first + size <= whole.stop


def test_0_24_refuses_what_it_cannot_read() -> None:
    with pytest.raises(EngineError, match="62 bytes does not hold 4 whole blocks"):
        tensors_0_24.block_outermost(Config(4, [Tensor24(62, ["a"])]))


@given(st.integers(1, 12), st.integers(1, 64), st.integers(1, 9))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_0_32_layers_of_a_block_lie_together(layers: int, size: int, blocks: int) -> None:
    whole = layers * size * blocks
    names = [f"l{n}" for n in range(layers)]
    before = Config(blocks, [Tensor32(whole, names, 0, size * blocks, size)])
    (tensor,) = tensors_0_32.block_outermost(before).kv_cache_tensors
    block_bytes = tensors_0_32.block_bytes(before)
    assert (block_bytes, tensor.block_stride) == (size * layers, block_bytes)
    starts = sorted(
        tensor.offset + layer * tensor.layer_stride + block * tensor.block_stride
        for layer in range(layers)
        for block in range(blocks)
    )
    assert starts == list(range(0, block_bytes * blocks, size))


class Backend:
    """An attention backend as far as it is asked."""

    def __init__(self, name: str, order: tuple[int, ...] | None) -> None:
        self._name, self._order = name, order

    def get_name(self) -> str:
        return self._name

    def get_kv_cache_stride_order(self) -> tuple[int, ...]:
        if self._order is None:
            raise NotImplementedError
        return self._order


@pytest.mark.parametrize(
    ("name", "order", "why"),
    [
        ("FLASH_ATTN", (0, 1, 2, 3, 4), None),
        ("TRITON_ATTN", (0, 1, 2, 3, 4), None),
        ("FLASHINFER", (0, 1, 2, 3, 4), None),
        ("FLASHINFER", (0, 1, 3, 2, 4), "HND"),
        ("CPU_ATTN", None, None),
        ("FLASH_ATTN", (0, 1, 3, 2, 4), "HND"),
    ],
)
def test_0_24_asks_the_attention_backend(
    name: str, order: tuple[int, ...] | None, why: str | None
) -> None:
    refusal = tensors_0_24.refusal(Backend(name, order))
    assert refusal is None if why is None else why in str(refusal)


# Bytes of a block in each layer, K and V apart or not, the blocks, and blocks in a page.
RUNS = st.lists(st.tuples(st.integers(1, 16), st.sampled_from([1, 2])), min_size=1, max_size=8)


@given(RUNS, st.integers(1, 40), st.integers(1, 8))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_layers_apart_lie_on_their_pages(
    kinds: list[tuple[int, int]], blocks: int, per_page: int
) -> None:
    """Of 0.24: where its views of tensors that lie end to end have a block, the layout has it."""
    sizes = [16 * units * planes for units, planes in kinds]
    before = Config(blocks, [Tensor24(size * blocks, [f"l{n}"]) for n, size in enumerate(sizes)])
    planes_of = {f"l{n}": planes for n, (_, planes) in enumerate(kinds)}
    runs = tensors_0_24.runs(before, planes_of)
    layout = BlockLayout.layer_outermost(blocks, runs, per_page, 16)
    in_pages = layout.num_pages * per_page
    after = tensors_0_24.layer_outermost(before, in_pages)
    allocated = tensors_0_24.allocations(after)
    assert sum(allocated) == layout.size_bytes
    assert layout.page_bytes == per_page * sum(sizes) == per_page * tensors_0_24.block_bytes(before)
    start, region = 0, 0
    seen: set[int] = set()
    for (_, planes), size, allocation in zip(kinds, sizes, allocated, strict=True):
        part = size // planes
        for plane in range(planes):
            for block in range(blocks):
                first = start + plane * in_pages * part + block * part
                place = layout.byte_range(BlockId(block), region)
                assert place == range(first, first + part)
                page = layout.page_byte_range(layout.page_of(BlockId(block)), region)
                assert page.start <= place.start and place.stop <= page.stop
                assert not seen.intersection(place)
                seen.update(place)
            region += 1
        start += allocation
    assert region == len(layout.regions)


@given(st.integers(1, 8), st.integers(1, 64), st.integers(1, 40), st.integers(1, 8))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_0_32_layers_apart_lie_on_their_pages(
    layers: int, units: int, blocks: int, per_page: int
) -> None:
    """Two groups that overlay each other, the second with one layer less."""
    size = 16 * units
    whole = layers * size * blocks
    names = [f"l{n}" for n in range(layers)]
    groups = [names, [f"w{n}" for n in range(max(layers - 1, 1))]]
    before = Config(blocks, [Tensor32(whole, group, 0, size * blocks, size) for group in groups])
    runs = tensors_0_32.runs(before, {})
    layout = BlockLayout.layer_outermost(blocks, runs, per_page, 16)
    after = tensors_0_32.layer_outermost(before, layout.num_pages * per_page)
    assert tensors_0_32.allocations(after) == [layout.size_bytes]
    for tensor in after.kv_cache_tensors:
        for layer in range(len(tensor.layers)):
            for block in range(blocks):
                first = tensor.offset + layer * tensor.layer_stride + block * tensor.block_stride
                assert layout.byte_range(BlockId(block), layer) == range(first, first + size)


def test_what_vllm_packs_itself_is_left_as_it_is() -> None:
    packed = Config(4, [Tensor24(64, ["a"], 0, 16), Tensor24(64, ["b"], 8, 16)])
    assert tensors_0_24.is_packed(packed)
    assert tensors_0_24.block_bytes(packed) == 16
    assert tensors_0_24.block_outermost(packed) == packed
    assert tensors_0_24.allocations(packed) == [64]
    other = Config(4, [Tensor32(64, ["a", "b"], 0, 8, 16)])
    assert tensors_0_32.is_packed(other)
    assert tensors_0_32.block_bytes(other) == 16
    assert tensors_0_32.block_outermost(other) == other


def test_layers_that_do_not_agree_are_refused() -> None:
    shared = Config(4, [Tensor24(64, ["a", "b"])])
    with pytest.raises(EngineError, match="lie in \\[1, 2\\] parts"):
        tensors_0_24.runs(shared, {"a": 1, "b": 2})
    scattered = Config(4, [Tensor32(64, ["a"], 0, 64, 16)])
    scattered.kv_cache_layout = "LHBNC"
    with pytest.raises(EngineError, match="layout LHBNC"):
        tensors_0_32.is_packed(scattered)
