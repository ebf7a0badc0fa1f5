"""What a real engine maps before a step needs it."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import MAX_TOKENS, MIB, PROMPTS, LlmProcess, switched_on


@pytest.mark.parametrize("executor", ["uni", "mp"])
def test_an_engine_at_rest_maps_for_requests_that_are_still_arriving(
    model: Path, plain: list[list[int]], tmp_path: Path, executor: str
) -> None:
    """With its worker in the engine's process, and in one of its own."""
    job = {
        "task": "burst",
        "model": str(model),
        "prompts": PROMPTS,
        "max_tokens": MAX_TOKENS,
        "arguments": {
            "max_num_seqs": 16,
            "max_num_batched_tokens": 4096,
            "distributed_executor_backend": executor,
        },
    }
    changes = switched_on(
        tmp_path, 64 * MIB, VLLM_ENABLE_V1_MULTIPROCESSING="0", KVCACHED_PAGE_SIZE_MB="1"
    )
    with LlmProcess(tmp_path / "llm", job, changes) as process:
        found = process.answer(200)

    created, facts = found["created"], found["aborted"]
    assert facts["page"] == MIB
    assert created[0] <= 2 * MIB, "one request takes its step at once"
    assert created == sorted(created)
    assert created[-1] >= created[0] + 8 * MIB, "no step was made"
    blocks = sum(len(prompt) // facts["block_tokens"] + 1 for prompt in PROMPTS)
    block_bytes = facts["block_bytes"]
    assert created[-1] <= (blocks * block_bytes // MIB + 3) * MIB, "not more than they need"
    assert facts["charge"] == facts["created"] <= 2 * MIB, "nobody wants it any more"
    assert found["outputs"] == plain


def test_blocks_that_a_batch_takes_all_at_once_are_mapped_before_that(
    model: Path, tmp_path: Path
) -> None:
    """Prompts of one length: every request needs another block in the same steps."""
    prompts = [[(i * 7 + j * 13) % 990 + 5 for j in range(70)] for i in range(48)]
    job = {
        "task": "lockstep",
        "model": str(model),
        "prompts": prompts,
        "max_tokens": MAX_TOKENS,
        "arguments": {"max_num_seqs": 48, "max_num_batched_tokens": 4096},
    }
    changes = switched_on(
        tmp_path,
        64 * MIB,
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        KVCACHED_PAGE_SIZE_MB="1",
        KVCACHED_WARM_HIGH="1",
    )
    with LlmProcess(tmp_path / "llm", job, changes) as process:
        found = process.answer(200)

    assert [len(answer) for answer in found["outputs"]] == [MAX_TOKENS] * 48
    # 48 blocks of 128 KiB after the prompts, and as many 32 steps later.
    assert found["ahead"] >= 12
    first = next((place for place, pages in enumerate(found["late"]) if pages), 0)
    assert sum(found["late"][first + 1 :]) <= 1, "no later step waits for more than a page"
