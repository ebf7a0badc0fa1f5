"""Makes the model of the engine tests (``python tiny_model.py FOLDER``).

A small Llama whose weights are large enough that attention decides what comes out: with the usual
initial weights an engine that lost its KV cache would give nearly the same tokens.
"""

from __future__ import annotations

import sys

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 1000


def make(folder: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        initializer_range=0.15,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        dtype="float32",
    )
    LlamaForCausalLM(config).float().save_pretrained(folder, safe_serialization=True)
    words = WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), bos_token="w1", eos_token="w2", unk_token="w0"
    )
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    make(sys.argv[1])
