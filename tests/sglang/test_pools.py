"""SGLang's real KV caches and allocators, elastic ones against SGLang's own as the oracle."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sgl_harness import MIB

from kvcached.config import Config
from kvcached.engines import base
from kvcached.engines.sglang import adapter, finder
from kvcached.engines.sglang.build import building
from kvcached.engines.sglang.slots import View
from kvcached.errors import EngineError, InvalidArgumentError

LAYERS, HEADS, HEAD_DIM = 3, 2, 64
SLOTS = 2048

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # SGLang's own, about this machine
    importlib.import_module(finder.SCHEDULER)
    memory_pool = importlib.import_module("sglang.srt.mem_cache.memory_pool")


def arguments(page_size: int) -> dict[str, Any]:
    names = ("speculative_algorithm", "disaggregation_mode", "enable_memory_saver")
    sizes = {"tp_size": 1, "pp_size": 1, "dp_size": 1, "nnodes": 1, "page_size": page_size}
    kind = {"device": "cpu", "attention_backend": "torch_native", "served_model_name": "pools"}
    return {**sizes, **kind, **dict.fromkeys(names)}


@pytest.fixture(scope="module")
def seams() -> Iterator[dict[str, Any]]:
    """The adapter's seams in place; the allocator classes, elastic and SGLang's own."""
    config = Config.from_env({"ENABLE_KVCACHED": "true"})
    wanted = adapter.current().seams(config)
    installed = base.install(wanted)
    by_name = {seam.name: vars(seam.owner)[seam.name] for seam in wanted}
    yield by_name
    installed.uninstall()


def make_cache(kind: str, page_size: int) -> Any:
    common = {"dtype": torch.float32, "layer_num": LAYERS, "device": "cpu"}
    common |= {"page_size": page_size, "enable_memory_saver": False}
    if kind == "mla":
        return memory_pool.MLATokenToKVPool(SLOTS, kv_lora_rank=96, qk_rope_head_dim=32, **common)
    return memory_pool.MHATokenToKVPool(SLOTS, head_num=HEADS, head_dim=HEAD_DIM, **common)


def make_allocator(cls: Any, page_size: int, cache: Any) -> Any:
    given = {"page_size": page_size, "dtype": torch.float32, "device": "cpu", "kvcache": cache}
    given["need_sort"] = False
    return call(functools.partial(cls, SLOTS), own(cls).__init__, given)


def own(cls: type) -> Any:
    """SGLang's own class under an elastic one."""
    return next(each for each in cls.__mro__ if each.__module__.startswith("sglang."))


def call(method: Any, described: Any, given: dict[str, Any]) -> Any:
    """Calls a method with those of the arguments that this version of SGLang knows."""
    accepted = inspect.signature(described).parameters
    return method(**{name: value for name, value in given.items() if name in accepted})


@dataclass
class Pair:
    """An elastic KV cache with its allocator, and SGLang's own beside it."""

    ours: Any
    theirs: Any
    cache: Any
    page_size: int

    @property
    def engine(self) -> Any:
        return self.ours.engine

    def mapped(self) -> set[int]:
        return set(self.engine.memory.mapper.arena.mapped_pages())

    def check(self, live: set[int]) -> None:
        """Everything that is in use lies on mapped pages, and both count the same."""
        self.engine.launch()
        self.engine.finish()
        self.engine.pages.check()
        per_page = self.engine.memory.layout.blocks_per_page * self.page_size
        assert {slot // per_page for slot in live} <= self.mapped()
        with self.ours.slots.seen_as(View.COUNTING):
            assert self.ours.available_size() == self.theirs.available_size()


@contextmanager
def pair(
    seams: dict[str, Any], folder: Path, kind: str, page_size: int, layout: str, capacity: int
) -> Iterator[Pair]:
    config = Config.from_env(
        {
            "ENABLE_KVCACHED": "true",
            "KVCACHED_DEVICE": f"host:pools-{os.getpid()}",
            "KVCACHED_DIR": str(folder / "ledger"),
            "KVCACHED_CAPACITY": str(capacity),
            "KVCACHED_LAYOUT": layout,
        }
    )
    name = "TokenToKVPoolAllocator" if page_size == 1 else "PagedTokenToKVPoolAllocator"
    elastic = seams[name]
    with building(config, arguments(page_size), adapter.current()):
        cache = make_cache(kind, page_size)
        ours = make_allocator(elastic, page_size, cache)
    theirs = make_allocator(own(elastic), page_size, SimpleNamespace())
    try:
        yield Pair(ours, theirs, cache, page_size)
    finally:
        ours.engine.memory.mapper.close()
        ours.engine.build.ledger.close()


def buffers(cache: Any, kind: str) -> list[torch.Tensor]:
    return list(cache.kv_buffer) if kind == "mla" else [*cache.k_buffer, *cache.v_buffer]


@pytest.mark.parametrize("layout", ["block", "layer"])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_slots_keep_what_is_written_while_others_come_and_go(
    seams: dict[str, Any], tmp_path: Path, kind: str, page_size: int, layout: str
) -> None:
    """Random allocations and frees; each slot's rows hold its own number all the time."""
    rng = random.Random(f"{kind}{page_size}{layout}")
    with pair(seams, tmp_path, kind, page_size, layout, 256 * MIB) as both:
        tensors = buffers(both.cache, kind)
        assert all(len(tensor) == SLOTS + page_size for tensor in tensors)
        live: list[tuple[list[int], torch.Tensor]] = []
        peak = 0
        for _ in range(120):
            if live and rng.random() < 0.45:
                ids, oracle = live.pop(rng.randrange(len(live)))
                rows = torch.tensor(ids)
                for number, tensor in enumerate(tensors):
                    expected = (rows * 8 + number).float()
                    assert torch.equal(tensor[rows].flatten(1)[:, 0], expected)
                    assert torch.equal(tensor[rows].flatten(1)[:, -1], expected)
                both.ours.free(rows)
                both.theirs.free(oracle)
            else:
                count = rng.choice([1, 5, 40, 150] if page_size == 1 else [16, 48, 112, 320])
                ours, theirs = both.ours.alloc(count), both.theirs.alloc(count)
                assert (ours is None) == (theirs is None)
                if ours is not None:
                    assert len(ours) == len(theirs) == count
                    both.engine.launch()  # mapped from here on
                    for number, tensor in enumerate(tensors):
                        shape = (-1, *[1] * (tensor.dim() - 1))
                        tensor[ours] = (ours * 8 + number).float().view(shape)
                    both.engine.finish()
                    live.append((ours.tolist(), theirs))
            held = [slot for ids, _ in live for slot in ids]
            assert len(set(held)) == len(held) and all(slot >= page_size for slot in held)
            both.check(set(held))
            peak = max(peak, len(both.mapped()))
        assert peak > 3
        both.ours.clear()
        both.theirs.clear()
        both.check(set())
        both.engine.idle(waits=False)
        both.engine.memory.mapper.drain(5.0)
        assert len(both.mapped()) <= 2, "the pinned page and a warm one"


def prefill_and_decode(both: Pair, prefix: list[int], total: list[int]) -> None:
    """The same extend and decode steps on both; what pages a request gets may differ."""
    before, after = torch.tensor(prefix), torch.tensor(total)
    last = torch.tensor([-1] * len(prefix))
    for allocator in (both.ours, both.theirs):
        given = {"prefix_lens": before, "seq_lens": after, "last_loc": last}
        given |= {"prefix_lens_cpu": before, "seq_lens_cpu": after}
        given["extend_num_tokens"] = int((after - before).sum())
        slots = call(allocator.alloc_extend, own(type(allocator)).alloc_extend, given)
        assert len(slots) == given["extend_num_tokens"]
        ends = torch.cumsum(after - before, 0) - 1
        tails, lens = slots[ends], after
        for _ in range(20):
            lens = lens + 1
            given = {"seq_lens": lens, "seq_lens_cpu": lens, "last_loc": tails}
            new = call(allocator.alloc_decode, own(type(allocator)).alloc_decode, given)
            inside = (lens - 1) % both.page_size != 0
            assert torch.equal(new[inside], tails[inside] + 1)
            assert bool((new[~inside] % both.page_size == 0).all())
            tails = new


# Triton's interpreter, with the numpy that it can use.
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
def test_pages_of_slots_are_filled_as_sglang_fills_them(
    seams: dict[str, Any], tmp_path: Path
) -> None:
    with pair(seams, tmp_path, "mha", 16, "auto", 256 * MIB) as both:
        prefill_and_decode(both, [0, 0, 0], [5, 16, 40])
        with both.ours.slots.seen_as(View.COUNTING):
            assert both.ours.available_size() == both.theirs.available_size()


@pytest.mark.parametrize("page_size", [1, 16])
def test_frees_in_a_group_come_back_at_its_end(
    seams: dict[str, Any], tmp_path: Path, page_size: int
) -> None:
    with pair(seams, tmp_path, "mha", page_size, "auto", 64 * MIB) as both:
        some, more = both.ours.alloc(4 * page_size), both.ours.alloc(2 * page_size)
        kept = both.theirs.alloc(4 * page_size), both.theirs.alloc(2 * page_size)
        for allocator, groups in ((both.ours, (some, more)), (both.theirs, kept)):
            allocator.free_group_begin()
            for group in groups:
                allocator.free(group)
            allocator.free_group_end()
        both.check(set())
        with pytest.raises(InvalidArgumentError):
            both.ours.free(some)


def test_a_shortage_is_an_answer_and_changes_nothing(seams: dict[str, Any], tmp_path: Path) -> None:
    """Memory for half of the slots."""
    with pair(seams, tmp_path, "mha", 1, "auto", SLOTS * LAYERS * HEADS * HEAD_DIM * 4) as both:
        most = both.ours.slots.most()
        assert 0 < most < SLOTS
        taken = both.ours.alloc(most)
        assert taken is not None and both.ours.alloc(1) is None
        assert both.ours.available_size() == 0
        with both.ours.slots.seen_as(View.COUNTING):
            assert both.ours.available_size() == SLOTS - most
        both.ours.free(taken[:10])
        assert both.ours.available_size() == 10 and len(both.ours.alloc(10)) == 10


def test_what_was_set_aside_cannot_be_taken(seams: dict[str, Any], tmp_path: Path) -> None:
    capacity = SLOTS * LAYERS * HEADS * HEAD_DIM * 4
    with pair(seams, tmp_path, "mha", 1, "auto", capacity) as both:
        slots = both.ours.slots
        most = slots.most()
        assert slots.secure(most)
        build = both.engine.build
        other = build.ledger.join("other", "other")
        assert not other.lease(both.engine.pages.page_bytes), "all of it is leased"
        assert len(both.ours.alloc(most)) == most
        other.close()


def test_what_was_promised_cannot_be_taken(seams: dict[str, Any], tmp_path: Path) -> None:
    capacity = SLOTS * LAYERS * HEADS * HEAD_DIM * 4
    with pair(seams, tmp_path, "mha", 1, "auto", capacity) as both:
        slots = both.ours.slots
        slots.begin_promises()
        assert slots.promise(300) and slots.promise(200)
        other = both.engine.build.ledger.join("other", "other")
        assert other.lease(other.leasable())
        assert not slots.promise(slots.most()), "it is with the other now"
        assert len(both.ours.alloc(300)) == 300 and len(both.ours.alloc(200)) == 200
        other.close()


def test_pages_stay_until_the_steps_in_flight_are_done(
    seams: dict[str, Any], tmp_path: Path
) -> None:
    with pair(seams, tmp_path, "mha", 1, "auto", 64 * MIB) as both:
        engine = both.engine
        taken = both.ours.alloc(1500)
        engine.launch()  # the first step
        mapped = both.mapped()
        assert len(mapped) > 10
        engine.launch()  # the second, which still writes there
        both.ours.free(taken)
        engine.finish()
        engine.launch()  # the third: what is given up waits for the second
        engine.memory.mapper.drain(5.0)
        assert both.mapped() >= mapped
        engine.finish()
        engine.launch()
        engine.memory.mapper.drain(5.0)
        assert len(both.mapped()) < len(mapped) / 2
        both.theirs.clear()
        both.check(set())


def test_a_second_kv_cache_is_refused(seams: dict[str, Any], tmp_path: Path) -> None:
    config = Config.from_env(
        {"KVCACHED_DEVICE": f"host:pools-{os.getpid()}", "KVCACHED_DIR": str(tmp_path / "ledger")}
    )
    with building(config, arguments(1), adapter.current()) as build:
        make_cache("mha", 1)
        with pytest.raises(EngineError, match="several"):
            make_cache("mha", 1)
    assert build.memory is not None
    build.memory.mapper.close()
    with pytest.raises(EngineError, match="outside of its scheduler"):
        make_cache("mha", 1)
