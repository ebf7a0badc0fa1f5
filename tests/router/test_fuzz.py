"""Rubbish of all kinds, made from the published description: nothing that it does not allow for
comes back, and the router goes on. ``SCHEMATHESIS_EXAMPLES`` makes the run longer.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from router_runs import Running, ToyEngine, wait_until

pytest.importorskip("schemathesis")


def test_the_description_is_kept(router: Running, engines: list[ToyEngine], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "schemathesis.cli", "run", router.url + "/openapi.json"]
    command += ["--max-examples", os.environ.get("SCHEMATHESIS_EXAMPLES", "25")]
    # What is wrong with a body's fields is the engine's to say, and this engine takes everything.
    command += ["--exclude-checks", "negative_data_rejection"]
    command += ["--generation-deterministic", "--no-color"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    print(done.stdout)
    assert done.returncode == 0, done.stdout
    assert engines[0].seen()["served"] > 0
    wait_until(lambda: router.tasks() <= 3, 5, "tasks have ended")
    httpx.post(router.url + "/v1/completions", json={"model": "a"}).raise_for_status()
