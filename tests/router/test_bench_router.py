"""``kvcached bench router``: its figures fit together, on a small run."""

from __future__ import annotations

import json
import subprocess
import sys


def test_a_small_run() -> None:
    command = [sys.executable, "-m", "kvcached.cli.main", "bench", "router", "--json"]
    command += ["--rate", "50", "--words", "3", "--pairs", "2", "--seconds", "1"]
    command += ["--requests", "200"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert len(result["pairs"]) == 2
    for pair in result["pairs"]:
        assert pair["requests"] > 20
        for key in ("ttft_p50", "ttft_p99", "p50", "p99"):
            direct, router = pair[f"direct_{key}_ms"], pair[f"router_{key}_ms"]
            assert direct > 0 and router > 0
            assert abs(pair[f"added_{key}_ms"] - (router - direct)) < 0.002
        assert pair["direct_ttft_p50_ms"] < pair["direct_p50_ms"]
    memory = result["memory"]
    assert memory["requests"] == 200 and memory["descriptors"] > 3
    assert min(memory["rss_bytes"]) > 1 << 20
