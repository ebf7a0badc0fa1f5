"""What runs only on a GPU, on vLLM 0.24's real functions with tensors of the CPU; run by
test_gpu_parts.py.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.attention.backends import utils
from vllm.v1.attention.backends.mla.triton_mla import TritonMLABackend
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    MLAAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.worker.gpu import attn_utils, warmup

from kvcached.engines.vllm import backends, geometry
from kvcached.engines.vllm import tensors_0_24 as tensors
from kvcached.engines.vllm.steps import new_blocks
from kvcached.engines.vllm.zeros import AnswerZeros
from kvcached.layout import HOST_LIMITS

LAYERS, BLOCKS, TOKENS, HEADS, HEAD = 3, 5, 16, 2, 8
SHAPE = (BLOCKS, 2, TOKENS, HEADS, HEAD)


def config(blocks: int = BLOCKS) -> Any:
    spec = FullAttentionSpec(
        block_size=TOKENS, num_kv_heads=HEADS, head_size=HEAD, dtype=torch.float16
    )
    names = [f"layer{n}" for n in range(LAYERS)]
    return KVCacheConfig(
        num_blocks=blocks,
        kv_cache_tensors=[
            KVCacheTensor(size=spec.page_size_bytes * blocks, shared_by=[name]) for name in names
        ],
        kv_cache_groups=[KVCacheGroupSpec(names, spec)],
    )


def check_views() -> None:
    """The V2 runner's own views of the rewritten configuration, over the one tensor it asks for:
    every element of every block is written once, by the layer that owns it.
    """
    plain = config()
    packed = tensors.block_outermost(plain)
    block_bytes = tensors.block_bytes(plain)
    arena = torch.full((block_bytes * BLOCKS,), -1, dtype=torch.int8)
    with AnswerZeros(tensors.allocations(packed), arena) as answer:
        raw = attn_utils._allocate_kv_cache(packed, {}, torch.device("cpu"))
    assert not answer.left
    assert all(tensor.data_ptr() == arena.data_ptr() for tensor in raw.values())
    spec = packed.kv_cache_groups[0].kv_cache_spec
    views = [
        attn_utils._reshape_attention_kv_cache(
            raw[place.shared_by[0]],
            spec,
            SHAPE,
            (0, 1, 2, 3, 4),
            BLOCKS,
            (place.offset, place.block_stride),
        )
        for place in packed.kv_cache_tensors
    ]
    for layer, view in enumerate(views):
        assert tuple(view.shape) == SHAPE
        assert view.stride(0) * view.element_size() == block_bytes
        for block in range(BLOCKS):
            view[block] = layer * BLOCKS + block
    written = arena.view(torch.float16).view(BLOCKS, LAYERS, -1)
    for block in range(BLOCKS):
        for layer in range(LAYERS):
            assert (written[block, layer] == layer * BLOCKS + block).all(), (block, layer)


class Hybrid:
    """Real groups of layers: full, sliding and latent attention, of different head sizes."""

    def __init__(self, specs: dict[str, Any], block_count: int) -> None:
        scheduler = SimpleNamespace(disable_hybrid_kv_cache_manager=False)
        vllm_config = SimpleNamespace(
            scheduler_config=scheduler,
            kv_transfer_config=None,
            cache_config=SimpleNamespace(num_gpu_blocks_override=block_count),
            speculative_config=None,
        )
        groups = kv_cache_utils.get_kv_cache_groups(vllm_config, specs)
        self.config = kv_cache_utils.get_kv_cache_config_from_groups(vllm_config, groups, 1 << 30)
        self.specs = specs_of(self.config)


def specs_of(cache_config: Any) -> dict[str, Any]:
    """Each layer's specification."""
    return {
        name: getattr(group.kv_cache_spec, "kv_cache_specs", {}).get(name, group.kv_cache_spec)
        for group in cache_config.kv_cache_groups
        for name in group.layer_names
    }


def hybrids() -> list[Hybrid]:
    half = {"dtype": torch.float16, "num_kv_heads": HEADS}
    full = FullAttentionSpec(block_size=TOKENS, head_size=HEAD, **half)
    wide = FullAttentionSpec(block_size=TOKENS, head_size=3 * HEAD, **half)
    seen = SlidingWindowSpec(block_size=TOKENS, head_size=2 * HEAD, sliding_window=40, **half)
    chunk = ChunkedLocalAttentionSpec(
        block_size=TOKENS, head_size=HEAD, attention_chunk_size=64, **half
    )
    byte = {**half, "dtype": torch.uint8}
    fp8 = FullAttentionSpec(block_size=TOKENS, head_size=HEAD, **byte)
    latent = MLAAttentionSpec(
        block_size=TOKENS, num_kv_heads=1, head_size=576, dtype=torch.bfloat16
    )
    kinds = [
        [full] * 3,
        [full, full, seen, seen, seen, seen],
        [full, chunk, chunk, chunk],
        [full, wide],
        [fp8] * 2,
        [latent] * 3,
    ]
    return [
        Hybrid({f"layer{n}": spec for n, spec in enumerate(specs)}, 7 + 30 * index)
        for index, specs in enumerate(kinds)
    ]


def check_layouts(order: str) -> None:
    """The real views of real configurations, both ways: a block's bytes lie on its own page, and
    no two blocks share any, but for the layers of different groups that take turns.
    """
    utils.set_kv_cache_layout(order)
    for hybrid in hybrids():
        used = {
            name: TritonMLABackend if isinstance(spec, MLAAttentionSpec) else TritonAttentionBackend
            for name, spec in hybrid.specs.items()
        }
        for wanted in ("auto", "block", "layer"):
            latent = TritonMLABackend in used.values()
            if order == "HND" and wanted == "block" and not latent:
                continue  # refused: check_backend
            new = latent or order == "HND"
            for most in (1, 3):
                limits = replace(HOST_LIMITS, max_runs=most)
                plan = backends.decide(used, hybrid.config, tensors, wanted, "auto", limits)
                assert plan.block_outermost == (wanted == "block" or (wanted == "auto" and not new))
                if wanted == "auto" and not new and len(hybrid.config.kv_cache_tensors) == 3:
                    assert len(plan.runs) == most
                check_places(hybrid, used, plan)


def check_places(hybrid: Hybrid, used: dict[str, Any], plan: Any) -> None:
    device = SimpleNamespace(granularity=4096, page_limits=HOST_LIMITS, max_mappings=None)
    shape = geometry.of(hybrid.config, plan.runs, device, None)
    layout = shape.layout(plan.runs, 4096)
    placed = plan.apply(tensors, hybrid.config, shape.paged_blocks)
    arena = torch.zeros(layout.size_bytes, dtype=torch.int8)
    with AnswerZeros(tensors.allocations(placed), arena) as answer:
        raw = attn_utils._allocate_kv_cache(placed, {}, torch.device("cpu"))
    assert not answer.left
    groups = [
        SimpleNamespace(
            kv_cache_group_id=0, kv_cache_spec=spec, backend=used[name], layer_names=[name]
        )
        for name, spec in specs_of(placed).items()
    ]
    owners = torch.full((layout.size_bytes,), -1, dtype=torch.int64)
    for group in groups:
        (name,) = group.layer_names
        views = attn_utils._reshape_kv_cache(
            [group], raw, "auto", [group.kv_cache_spec.block_size], {}, placed
        )
        for block in sorted({0, 1, shape.num_blocks // 2, shape.num_blocks - 1}):
            arena.zero_()
            views[name].view(torch.uint8)[block].fill_(1)
            (written,) = arena.nonzero(as_tuple=True)
            assert len(written) == views[name][block].numel() * views[name].element_size()
            page = layout.page_of(block)
            inside = torch.zeros_like(written, dtype=torch.bool)
            for region in range(len(layout.regions)):
                own, whole = layout.byte_range(block, region), layout.page_byte_range(page, region)
                assert whole.start <= own.start and own.stop <= whole.stop
                inside |= (written >= own.start) & (written < own.stop)
            assert inside.all(), (name, block)
            before = owners[written]
            assert ((before == -1) | (before == block)).all(), "blocks share bytes"
            owners[written] = block


def check_backend() -> None:
    """What a real attention backend of 0.24 answers, for both layouts."""
    assert TritonAttentionBackend.get_name() in tensors.BACKENDS
    utils.set_kv_cache_layout("NHD")
    assert tensors.refusal(TritonAttentionBackend) is None
    utils.set_kv_cache_layout("HND")
    assert "HND" in str(tensors.refusal(TritonAttentionBackend))


def check_warm_up() -> None:
    """The steps that V2's warm-up makes up name every block that they use."""
    runner = SimpleNamespace(
        num_speculative_steps=0,
        decode_query_len=1,
        kv_cache_config=config(blocks=200),
        scheduler_config=SimpleNamespace(max_num_seqs=70, max_num_batched_tokens=2048),
        is_pooling_model=False,
        is_last_pp_rank=True,
        model_config=SimpleNamespace(get_vocab_size=lambda: 1000),
        kv_connector=SimpleNamespace(set_disabled=lambda _: None),
    )
    mapped: set[int] = set()
    steps = []

    def execute(output: Any) -> None:
        mapped.update(new_blocks(output))
        steps.append(output.total_num_scheduled_tokens)

    torch.accelerator.synchronize = lambda: None
    warmup.warmup_kernels(runner, execute, lambda _: None)
    assert steps == [140, 70, 0], steps
    assert mapped == set(range(1, 71)), sorted(mapped)


if __name__ == "__main__":
    check_views()
    check_layouts("NHD")
    check_layouts("HND")
    check_backend()
    check_warm_up()
