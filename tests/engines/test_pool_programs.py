"""vLLM's block pool under random programs, beside vLLM's own as the oracle."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
from harness import HERE, environment
from versions import vllm_version

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None or vllm_version().startswith("0.8."),
    reason="needs vLLM 0.13 or newer; of 0.8 test_vllm_0_8.py does the same",
)
SEEDS = 24


def run(seeds: int) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, str(HERE / "pool_programs_process.py"), str(seeds)],
        env=environment({"OMP_NUM_THREADS": "1"}, HERE),
        capture_output=True,
        text=True,
        timeout=230,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    counts: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return counts


def test_random_programs_on_the_block_pool() -> None:
    """Allocation, prefix hits, preemption, reclaim and resets: the same answers, and contents."""
    counts = run(SEEDS)
    print(counts)
    for what in ("admitted", "refused", "short of memory", "hits", "preempted", "resets"):
        assert counts[what] > 10, counts
    assert counts["blocks evicted"] > 50 and counts["pages taken back"] > 50
