"""The parts of the adapter that only a GPU runs, on the real functions of vLLM 0.24."""

from __future__ import annotations

import subprocess
import sys

import pytest
from harness import HERE, environment
from versions import vllm_version


def test_views_backends_and_warm_up_of_the_v2_runner() -> None:
    version = vllm_version()
    if not version.startswith("0.24."):
        pytest.skip(f"this is vLLM {version}; GPUs are supported with 0.24 (make matrix)")
    result = subprocess.run(
        [sys.executable, str(HERE / "gpu_parts_process.py")],
        env=environment({}),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
