"""The tests of equal outputs test something: without the map commands the engine dies. And where
they are missing from the start, the self-test says so before it comes to that.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from harness import HERE, MIB, PROMPTS, LlmProcess, switched_on, wait_until


def ends(model: Path, folder: Path, library: Path, *, after_the_first: bool) -> tuple[int, str]:
    """How an engine ends whose pages are not mapped: its exit status and its log."""
    job = {
        "task": "no_maps",
        "model": str(model),
        "prompts": [PROMPTS[-1]],  # more than the pinned page holds
        "max_tokens": 4,
        "arguments": {},
        "report_faults": str(library),
        "after_the_first": after_the_first,
    }
    changes = switched_on(
        folder,
        32 * MIB,
        KVCACHED_WARM_LOW="0",
        KVCACHED_WARM_HIGH="0",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )
    with LlmProcess(folder / "llm", job, changes) as process:
        wait_until(lambda: process.process.poll() is not None, 200, "the engine dies")
        return process.process.returncode, process.log.read_text()


@pytest.fixture
def report_faults(tmp_path: Path) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    library = tmp_path / "report_faults.so"
    source = str(HERE / "report_faults.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), source], check=True)
    return library


def test_without_map_commands_the_engine_dies_in_the_reservation(
    model: Path, tmp_path: Path, report_faults: Path
) -> None:
    code, log = ends(model, tmp_path, report_faults, after_the_first=True)
    assert code == -signal.SIGSEGV, log[-3000:]
    reserved = re.search(r"reservation (0x[0-9a-f]+) (0x[0-9a-f]+)", log)
    fault = re.search(r"fault at (0x[0-9a-f]+)", log)
    assert reserved and fault, log[-3000:]
    start, size = (int(text, 16) for text in reserved.groups())
    assert start <= int(fault[1], 16) < start + size


def test_the_self_test_notices_a_first_step_without_its_pages(
    model: Path, tmp_path: Path, report_faults: Path
) -> None:
    code, log = ends(model, tmp_path, report_faults, after_the_first=False)
    assert code == 1, log[-3000:]
    assert "fault at" not in log
    for words in ("does not fit this vLLM", "are not mapped", "Unset ENABLE_KVCACHED"):
        assert words in log, log[-3000:]
