"""Real SGLang engines and classes: one tiny model and one plain answer for all of them.

Run in an environment of ``tools/setup_sglang.py``; elsewhere there is nothing to collect.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from sgl_harness import ENVIRONMENT, MAX_TOKENS, PROMPTS, Engine  # noqa: E402

HAS_SGLANG = importlib.util.find_spec("sglang") is not None
collect_ignore_glob = [] if HAS_SGLANG else ["test_*.py"]
if HAS_SGLANG:
    os.environ.update(ENVIRONMENT)  # for tests that use SGLang's classes in this process

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


@pytest.fixture(autouse=True)
def what_runs(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> None:
    """For the support matrix (``tools/matrix.py``): whether a real engine runs a real model."""
    runs_a_model = "model" in request.fixturenames
    record_property("runs", "real engine" if runs_a_model else "real classes")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("tiny"), "llama")


def made(folder: Path, kind: str) -> Path:
    program = [sys.executable, str(HERE / "make_model.py"), str(folder), kind]
    subprocess.run(program, check=True, capture_output=True, timeout=120)
    return folder


@pytest.fixture(scope="session")
def reference(model: Path) -> list[list[int]]:
    """What transformers answers in float32."""
    return answered_by_transformers(model)


def answered_by_transformers(model: Path) -> list[list[int]]:
    job = {"model": str(model), "prompts": PROMPTS, "max_tokens": MAX_TOKENS}
    done = subprocess.run(
        [sys.executable, "-c", REFERENCE],
        input=json.dumps(job),
        check=True,
        capture_output=True,
        text=True,
        timeout=200,
    )
    outputs = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({tuple(tokens) for tokens in outputs}) == len(PROMPTS)
    return outputs


@pytest.fixture(scope="session")
def plain(
    model: Path, reference: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> list[list[int]]:
    """What SGLang without kvcached answers: the same."""
    job = {"task": "equality", "model": str(model), "arguments": {}, "rounds": 1}
    with Engine(tmp_path_factory.mktemp("plain"), job, {}) as engine:
        outputs: list[list[int]] = engine.answer()["outputs"][0]
    assert outputs == reference
    return outputs
