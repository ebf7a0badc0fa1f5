"""vLLM 0.8.4, which runs on GPUs only: its real classes, and its real engine around a toy model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import HERE, MIB, environment, switched_on
from versions import vllm_version

pytestmark = pytest.mark.skipif(
    not vllm_version().startswith("0.8."), reason="these classes are vLLM 0.8's"
)

SEEDS = 60
CASES = [
    {"caching": True, "budget": 256, "seed": 1, "requests": 24},
    {"caching": False, "budget": 96, "seed": 2, "requests": 24},
    {"caching": True, "budget": 64, "seed": 3, "requests": 20, "window": 64},
]
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 997,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "torch_dtype": "float32",
}


def run(script: str, *arguments: str, changes: dict[str, str], limit_s: float = 200.0) -> str:
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments],
        env=environment({"OMP_NUM_THREADS": "1", **changes}, HERE),
        capture_output=True,
        text=True,
        timeout=limit_s,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def test_random_programs_on_the_block_pool_and_the_manager(tmp_path: Path) -> None:
    """Allocation, prefix hits, preemption, reclaim and resets, beside vLLM's own as the oracle."""
    counts = json.loads(run("classes_0_8_process.py", "0", str(SEEDS), changes={}).splitlines()[-1])
    print(counts)
    for what in ("admitted", "refused", "short of memory", "hits", "preempted", "resets"):
        assert counts[what] > 20, counts
    assert counts["blocks evicted"] > 100 and counts["pages taken back"] > 100


@pytest.fixture(scope="module")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    (folder / "config.json").write_text(json.dumps(MODEL))
    return folder


def toy(folder: Path, model: Path, changes: dict[str, str], **more: Any) -> list[dict[str, Any]]:
    folder.mkdir()
    answer = folder / "answer.json"
    job = {"model": str(model), "answer": str(answer), "cases": CASES, **more}
    (folder / "job.json").write_text(json.dumps(job))
    run("toy_run_0_8.py", str(folder / "job.json"), changes=changes)
    found: list[dict[str, Any]] = json.loads(answer.read_text())
    return found


@pytest.fixture(scope="module")
def plain(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[list[int]]]:
    """What vLLM without kvcached answers, with memory for everything."""
    found = toy(tmp_path_factory.mktemp("plain") / "run", toy_model, {})
    assert all(facts["preemptions"] == 0 for facts in found)
    answers = [facts["answers"] for facts in found]
    assert len({tuple(tokens) for tokens in answers[0]}) > 20
    return answers


@pytest.mark.parametrize("layout", ["auto", "block"])
@pytest.mark.parametrize("capacity", [16 * MIB, 2 * MIB], ids=["roomy", "tight"])
def test_the_real_engine_answers_as_without_kvcached(
    toy_model: Path, plain: list[list[list[int]]], tmp_path: Path, layout: str, capacity: int
) -> None:
    changes = switched_on(tmp_path, capacity, KVCACHED_VIRTUAL=str(32 * MIB))
    found = toy(tmp_path / "ours", toy_model, {**changes, "KVCACHED_LAYOUT": layout})
    for case, facts, answers in zip(CASES, found, plain, strict=True):
        assert facts["answers"] == answers, case
        loaded, reset = facts["loaded"], facts["reset"]
        assert loaded["high_water"] <= loaded["capacity"] == capacity
        assert loaded["used_blocks"] == 1, "the null block"
        assert facts["maps"] > 4 and facts["most_running"] > 2
        assert (loaded["hits"] > 0) == case["caching"]
        assert reset["created"] == reset["charge"] <= reset["pinned"] + reset["page"]
    assert any(facts["preemptions"] > 0 for facts in found) == (capacity < 4 * MIB)
