"""The scripts at the paths that users know: what they say without an engine."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvcached.ledger import Ledger

ROOT = Path(__file__).resolve().parents[2]
INTEGRATION = ROOT / "engine_integration"
SETUP = INTEGRATION / "scripts" / "setup.sh"
SERVER = INTEGRATION / "benchmark" / "start_server.sh"
CLIENT = INTEGRATION / "benchmark" / "start_client.sh"
SCRIPTS = (SETUP, SERVER, CLIENT)


def call(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(script), *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_help_and_wrong_arguments(script: Path) -> None:
    assert os.access(script, os.X_OK)
    told = call(script, "--help")
    assert told.returncode == 0 and told.stdout.startswith("Usage: ./" + script.name)
    wrong = call(script, "vllm", "--no-such-option")
    assert wrong.returncode == 2 and "--no-such-option" in wrong.stderr


@pytest.mark.parametrize("script", (SERVER, CLIENT), ids=lambda script: script.name)
def test_without_an_environment_they_say_what_to_run(script: Path, tmp_path: Path) -> None:
    copy = tmp_path / "engine_integration" / "benchmark"
    shutil.copytree(script.parent, copy)
    told = call(copy / script.name, "sgl")
    assert told.returncode == 1
    assert told.stderr.count("\n") == 1 and "scripts/setup.sh" in told.stderr


def test_memory_over_time_writes_what_the_ledger_says(tmp_path: Path) -> None:
    script, out = INTEGRATION / "benchmark" / "memory_over_time.py", tmp_path / "memory.csv"
    environment = {**os.environ, "KVCACHED_DIR": str(tmp_path / "ledger")}
    with Ledger.open(tmp_path / "ledger", "host:test", 100 << 20) as ledger:
        account = ledger.join("one", "one")
        assert account.lease(40 << 20)
        command = [sys.executable, str(script), "--out", str(out)]
        with subprocess.Popen(command, env=environment) as process:
            while not out.exists() or out.read_text().count("\n") < 3:
                assert process.poll() is None
            process.terminate()
            assert process.wait(timeout=30) == 0
    with out.open() as stream:
        rows = list(csv.DictReader(stream))
    assert {(row["device"], row["instance"], row["charge"], row["capacity"]) for row in rows} == {
        ("host:test", "one", str(40 << 20), str(100 << 20))
    }
    told = subprocess.run(
        [sys.executable, str(script), "--show", str(out)], capture_output=True, text=True
    )
    assert (
        told.returncode == 0 and "KV cache of one on host:test (100 MiB): most 40.0M" in told.stdout
    )
