"""Makes a model of the engine tests (``python tiny_model.py FOLDER [llama|sliding|hybrid|mla]``).

Small ones whose weights are large enough that attention decides what comes out: with the usual
initial weights an engine that lost its KV cache would give nearly the same tokens.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

VOCABULARY = 1000
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**COMMON))


def sliding() -> Any:
    """Every layer sees the last tokens only: one group of blocks, most of them freed on the way."""
    return MistralForCausalLM(MistralConfig(**COMMON, sliding_window=64))


def hybrid() -> Any:
    """Layers that see everything and layers that do not: groups with block tables of their own."""
    kinds = ["sliding_attention", "full_attention"] * 2
    config = Gemma3TextConfig(
        **COMMON, head_dim=64, sliding_window=64, layer_types=kinds, query_pre_attn_scalar=64
    )
    return Gemma3ForCausalLM(config)


def mla() -> Any:
    """DeepSeek's latent attention: one vector a token in place of keys and values."""
    shape = {**COMMON, "num_key_value_heads": 4}
    config = DeepseekV2Config(
        **shape,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        first_k_dense_replace=4,
        n_routed_experts=2,
        n_shared_experts=1,
        num_experts_per_tok=1,
        moe_intermediate_size=128,
    )
    return DeepseekV2ForCausalLM(config)


MODELS = {"llama": llama, "sliding": sliding, "hybrid": hybrid, "mla": mla}


def make(folder: str, kind: str = "llama") -> None:
    torch.manual_seed(0)
    MODELS[kind]().float().save_pretrained(folder, safe_serialization=True)
    words = WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), bos_token="w1", eos_token="w2", unk_token="w0"
    )
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    make(*sys.argv[1:])
