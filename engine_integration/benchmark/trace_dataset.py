#!/usr/bin/env python3
"""Writes requests with the lengths of a real trace, for the serving benchmarks of vLLM and SGLang
(the form is that of ShareGPT).

The trace is the slice of AzureLLMInferenceTrace_conv (Azure Public Dataset, 2023) that the demo
carries. It has no texts: prompts and answers are random tokens of the model's tokenizer, and the
length of an answer tells the benchmark how many tokens to ask for.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from kvcached.demo.trace import read_slice

SEED = 17
SHORTEST = 8  # tokens; the benchmarks drop requests of less than 4
# The benchmarks drop prompts of more tokens than this, and prompts with answers of more than twice.
LONGEST = 1000


def text(tokenizer: Any, draw: random.Random, tokens: int) -> str:
    """Random text of about so many tokens."""
    ids = [draw.randrange(1000, tokenizer.vocab_size) for _ in range(tokens)]
    decoded = tokenizer.decode(ids)
    # Decoding and encoding again may give more tokens than there were.
    return str(tokenizer.decode(tokenizer.encode(decoded, add_special_tokens=False)[:tokens]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--requests", type=int, required=True)
    parser.add_argument("--scale", type=float, default=1.0, help="divides all lengths")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    draw, rows = random.Random(SEED), read_slice()
    requests = []
    for number in range(options.requests):
        row = rows[number % len(rows)]
        lengths = (row.context_tokens / options.scale, row.generated_tokens / options.scale)
        prompt, answer = (min(max(round(length), SHORTEST), LONGEST) for length in lengths)
        turns = [("human", prompt), ("gpt", answer)]
        requests.append(
            {
                "id": str(number),
                "conversations": [
                    {"from": who, "value": text(tokenizer, draw, tokens)} for who, tokens in turns
                ],
            }
        )
    options.out.write_text(json.dumps(requests))


if __name__ == "__main__":
    main()
