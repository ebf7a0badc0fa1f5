"""What runs only on a GPU, on vLLM 0.24's real functions with tensors of the CPU; run by
test_gpu_parts.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.attention.backends import utils
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
)
from vllm.v1.worker.gpu import attn_utils, warmup

from kvcached.engines.vllm import tensors_0_24 as tensors
from kvcached.engines.vllm.worker import AnswerZeros, _blocks

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
        mapped.update(_blocks(output))
        steps.append(output.total_num_scheduled_tokens)

    torch.accelerator.synchronize = lambda: None
    warmup.warmup_kernels(runner, execute, lambda _: None)
    assert steps == [140, 70, 0], steps
    assert mapped == set(range(1, 71)), sorted(mapped)


if __name__ == "__main__":
    check_views()
    check_backend()
    check_warm_up()
