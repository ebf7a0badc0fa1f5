"""The tests of equal outputs test something: without the map commands the engine dies."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from harness import HERE, MIB, PROMPTS, LlmProcess, switched_on, wait_until


def test_without_map_commands_the_engine_dies_in_the_reservation(
    model: Path, tmp_path: Path
) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    library = tmp_path / "report_faults.so"
    source = str(HERE / "report_faults.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), source], check=True)
    job = {
        "task": "no_maps",
        "model": str(model),
        "prompts": [PROMPTS[-1]],  # more than the pinned page holds
        "max_tokens": 4,
        "arguments": {},
        "report_faults": str(library),
    }
    changes = switched_on(tmp_path, 32 * MIB, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    with LlmProcess(tmp_path / "llm", job, changes) as process:
        wait_until(lambda: process.process.poll() is not None, 200, "the engine dies")
        log = process.log.read_text()
    assert process.process.returncode == -signal.SIGSEGV, log[-3000:]
    reserved = re.search(r"reservation (0x[0-9a-f]+) (0x[0-9a-f]+)", log)
    fault = re.search(r"fault at (0x[0-9a-f]+)", log)
    assert reserved and fault, log[-3000:]
    start, size = (int(text, 16) for text in reserved.groups())
    assert start <= int(fault[1], 16) < start + size
