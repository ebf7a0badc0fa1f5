"""Makes the model of the SGLang tests (``python make_model.py FOLDER [llama|mla]``), with any
version of transformers that they use.

Weights are large enough that attention decides what comes out: with the usual initial weights an
engine that lost its KV cache would give nearly the same tokens.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 1000
SHAPE: dict[str, Any] = {
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
    "pad_token_id": 0,
}


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def mla() -> Any:
    """DeepSeek's latent attention: one vector a token in place of keys and values."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    shape = {**SHAPE, "num_key_value_heads": 4, "first_k_dense_replace": 4}
    latent = {"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
    experts = {"n_routed_experts": 2, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1}
    config = DeepseekV3Config(**shape, **latent, **experts, q_lora_rank=None)
    return DeepseekV3ForCausalLM(config)


def main(folder: str, kind: str = "llama") -> None:
    torch.manual_seed(0)
    {"llama": llama, "mla": mla}[kind]().float().save_pretrained(folder, safe_serialization=True)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="w1", eos_token="w2", unk_token="w0", pad_token="w0"
    )
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
