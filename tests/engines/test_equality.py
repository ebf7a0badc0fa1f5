"""One elastic engine says what plain vLLM says, and holds no more than it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import MAX_TOKENS, MIB, PROMPTS, LlmProcess, switched_on
from memory_watch import MemoryWatch

CASES = [
    # name, multi-process, capacity, preempts, arguments
    pytest.param(False, 64 * MIB, False, {"enable_prefix_caching": True}, id="in-process-cached"),
    pytest.param(
        False,
        64 * MIB,
        False,
        {"enable_prefix_caching": False, "max_num_batched_tokens": 96},
        id="in-process-chunked-prefill",
    ),
    pytest.param(
        False, 6 * MIB, True, {"enable_prefix_caching": True}, id="in-process-preempting-cached"
    ),
    pytest.param(
        True,
        6 * MIB,
        True,
        {"enable_prefix_caching": False, "max_num_batched_tokens": 160},
        id="multi-process-preempting-chunked",
    ),
    pytest.param(True, 10 * MIB, False, {"enable_prefix_caching": True}, id="multi-process-cached"),
    pytest.param(  # what runs on a GPU by default; a CPU's runner answers it as well
        False,
        64 * MIB,
        False,
        {
            "enable_prefix_caching": True,
            "scheduler_cls": "vllm.v1.core.sched.async_scheduler.AsyncScheduler",
        },
        id="in-process-async-scheduler",
    ),
]


@pytest.mark.parametrize(("multi", "capacity", "preempts", "arguments"), CASES)
def test_outputs_are_those_of_plain_vllm(
    model: Path,
    plain: list[list[int]],
    tmp_path: Path,
    multi: bool,
    capacity: int,
    preempts: bool,
    arguments: dict[str, Any],
) -> None:
    job = {
        "task": "equality",
        "model": str(model),
        "prompts": PROMPTS,
        "max_tokens": MAX_TOKENS,
        "rounds": 2,
        "arguments": arguments,
    }
    changes = switched_on(tmp_path, capacity, VLLM_ENABLE_V1_MULTIPROCESSING=str(int(multi)))
    process = LlmProcess(tmp_path / "llm", job, changes)
    with process, MemoryWatch(lambda: [process.process.pid]) as memory:
        result = process.answer(200)

    assert result["outputs"] == [plain, plain]
    assert (result["preemptions"] > 0) == preempts or not preempts
    loaded, reset = result["loaded"], result["reset"]
    assert memory.samples > 20
    assert 2 * loaded["page"] < memory.peak <= capacity
    assert loaded["high_water"] <= loaded["capacity"] == capacity
    assert (loaded["cached"] > 0) == arguments["enable_prefix_caching"]
    assert loaded["physical"] == loaded["created"] == loaded["charge"]
    assert reset["physical"] == reset["created"] == reset["charge"]
    assert reset["charge"] <= reset["pinned"] + reset["page"], "pinned and at most one warm page"
