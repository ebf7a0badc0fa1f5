"""Models of the SGLang tests, and what transformers says of them: in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from sgl_harness import HERE, MAX_TOKENS, PROMPTS

REFERENCE = """
import json, sys, torch
from transformers import AutoModelForCausalLM
job = json.loads(sys.stdin.read())
model = AutoModelForCausalLM.from_pretrained(job["model"], torch_dtype=torch.float32).eval()
model.generation_config.eos_token_id = None
for prompt in job["prompts"]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=job["max_tokens"],
        do_sample=False,
        pad_token_id=0,
    )
    print(json.dumps(out[0, len(prompt):].tolist()))
"""


def made(folder: Path, kind: str) -> Path:
    program = [sys.executable, str(HERE / "make_model.py"), str(folder), kind]
    subprocess.run(program, check=True, capture_output=True, timeout=300)
    return folder


def answered_by_transformers(model: Path) -> list[list[int]]:
    job = {"model": str(model), "prompts": PROMPTS, "max_tokens": MAX_TOKENS}
    done = subprocess.run(
        [sys.executable, "-c", REFERENCE],
        input=json.dumps(job),
        check=True,
        capture_output=True,
        text=True,
        timeout=400,
    )
    outputs = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({tuple(tokens) for tokens in outputs}) == len(PROMPTS)
    return outputs
