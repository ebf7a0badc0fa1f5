"""Blocks and pages of vLLM's kinds of KV cache: how many a sequence needs, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvcached.engines.vllm import geometry
from kvcached.errors import EngineError
from kvcached.layout import CUDA_LIMITS
from kvcached.units import KIB, MIB


def spec(kind: str, block_size: int = 16, **fields: Any) -> Any:
    """A stand-in with the name of vLLM's own class."""
    return type(kind, (SimpleNamespace,), {})(block_size=block_size, **fields)


def config(*specs: Any, num_blocks: int = 1000) -> Any:
    groups = [SimpleNamespace(kv_cache_spec=one, layer_names=["a"]) for one in specs]
    return SimpleNamespace(num_blocks=num_blocks, kv_cache_groups=groups)


GPU: Any = SimpleNamespace(granularity=2 * MIB, page_limits=CUDA_LIMITS, max_mappings=None)
FULL = spec("FullAttentionSpec", sliding_window=None)
SEEN = spec("SlidingWindowSpec", 32, sliding_window=100)
CHUNKED = spec("ChunkedLocalAttentionSpec", attention_chunk_size=64)


def test_pages_of_layers_apart_take_a_granule_of_each() -> None:
    """Llama 8B: 64 runs of 32 KiB a block, K and V apart."""
    shape = geometry.of(config(FULL), [32 * KIB] * 64, GPU, None)
    assert (shape.blocks_per_page, shape.page_bytes) == (64, 128 * MIB)
    assert shape.paged_blocks == 1024
    layout = shape.layout([32 * KIB] * 64, 2 * MIB)
    assert len(layout.regions) == 64
    assert layout.zero_bytes == 2 * MIB
    together = geometry.of(config(FULL), [2 * MIB], GPU, None)
    assert (together.blocks_per_page, together.page_bytes) == (16, 32 * MIB)


def test_a_sequence_needs_blocks_in_every_group() -> None:
    shape = geometry.of(config(FULL, SEEN, SEEN, CHUNKED), [64 * KIB], GPU, None)
    assert shape.block_tokens == 16
    assert shape.least_blocks(10) == 4
    assert shape.least_blocks(1600) == 100 + 2 * 4 + 1
    only = geometry.of(config(SEEN), [64 * KIB], GPU, None)
    assert (only.block_tokens, only.least_blocks(1 << 20)) == (32, 4)


def test_layers_of_one_group_may_differ() -> None:
    uniform = spec(
        "UniformTypeKVCacheSpecs",
        kv_cache_specs={"a": FULL, "b": spec("MLAAttentionSpec"), "c": SEEN},
    )
    (group,) = geometry.groups_of(config(uniform))
    assert (group.block_tokens, group.window_tokens) == (16, None)


def test_what_is_not_supported_is_named() -> None:
    with pytest.raises(EngineError, match="kind MambaSpec yet"):
        geometry.of(config(FULL, spec("MambaSpec")), [MIB], GPU, None)
    with pytest.raises(EngineError, match="no KV cache"):
        geometry.of(config(), [], GPU, None)


def test_the_scheduler_finds_the_workers_pages_in_the_ledger() -> None:
    row: Any = SimpleNamespace(block_bytes=MIB, page_bytes=48 * MIB)
    shape = geometry.described(config(FULL), MIB, 1, row)
    assert (shape.blocks_per_page, shape.page_bytes) == (48, 48 * MIB)
    for account in (row, None):
        with pytest.raises(EngineError, match="scheduler's blocks have 2097152 bytes"):
            geometry.described(config(FULL), 2 * MIB, 1, account)
    shared = geometry.described(config(FULL), MIB // 2, 2, row)
    assert (shared.blocks_per_page, shared.block_bytes) == (48, MIB // 2), "of each of two ranks"
