"""Layers apart, zeros under holes, groups of layers, latent attention, drafted tokens: each says
what plain vLLM says with the same settings.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from harness import HERE, MAX_TOKENS, MIB, PROMPTS, LlmProcess, environment, switched_on

NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}
# model, arguments, environment of the elastic engine
ENGINES: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "layer": ("llama", {}, {"KVCACHED_LAYOUT": "layer"}),
    "hybrid": ("hybrid", {"enable_prefix_caching": True}, {"KVCACHED_UNMAPPED": "zero"}),
    "mla": ("mla", {}, {}),
    # Last: vLLM cannot register its kernels again in a process that has this drafter.
    "ngram": ("llama", {"speculative_config": NGRAM}, {}),
}


def answers(
    folder: Path, models: dict[str, Path], changes: dict[str, str], **common: Any
) -> dict[str, Any]:
    engines = {
        name: {
            "model": str(models[model]),
            "arguments": {"enable_prefix_caching": False, **common, **arguments},
            "environment": own if common == {} else {},
        }
        for name, (model, arguments, own) in ENGINES.items()
    }
    job = {"task": "several", "prompts": PROMPTS, "max_tokens": MAX_TOKENS, "engines": engines}
    with LlmProcess(folder, job, {**changes, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}) as process:
        process.process.wait(230)
        assert process.process.returncode == 0, process.log_tail()
        results: dict[str, Any] = process.answer(1)
    return results


def test_outputs_are_those_of_plain_vllm(model: Path, tmp_path: Path) -> None:
    models = {"llama": model}
    for kind in ("hybrid", "mla"):
        models[kind] = tmp_path / kind
        command = [sys.executable, str(HERE / "tiny_model.py"), str(models[kind]), kind]
        subprocess.run(command, env=environment({}), check=True, capture_output=True)
    plain = answers(tmp_path / "plain", models, {}, kv_cache_memory_bytes=64 * MIB)
    ours = answers(tmp_path / "ours", models, switched_on(tmp_path, 64 * MIB))
    for name, found in ours.items():
        assert len({tuple(tokens) for tokens in found["outputs"]}) == len(PROMPTS), name
        assert found["outputs"] == plain[name]["outputs"], name
        assert found["mapped"] > 4, name
    zeros = ours["hybrid"]["loaded"]
    assert zeros["pinned"] == 2 * zeros["page"]


test_outputs_are_those_of_plain_vllm.limit_s = 480.0  # type: ignore[attr-defined]
