"""What every answer is compared with."""

from __future__ import annotations

from pathlib import Path

from harness import MAX_TOKENS, MIB, PROMPTS, LlmProcess


def answers_of_plain_vllm(model: Path, folder: Path) -> list[list[int]]:
    """The tokens that vLLM without kvcached gives to each prompt. ``folder`` is for its log."""
    job = {
        "task": "equality",
        "model": str(model),
        "prompts": PROMPTS,
        "max_tokens": MAX_TOKENS,
        "rounds": 1,
        "arguments": {"enable_prefix_caching": False, "kv_cache_memory_bytes": 64 * MIB},
    }
    changes = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with LlmProcess(folder, job, changes) as process:
        result = process.answer(200)
    assert result["preemptions"] == 0
    outputs: list[list[int]] = result["outputs"][0]
    assert len({tuple(tokens) for tokens in outputs}) == len(PROMPTS)
    return outputs
