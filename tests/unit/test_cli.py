"""The command line: version, help, and errors of ours as one line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvcached
from kvcached.cli import main
from kvcached.cli.top import command as kvtop
from kvcached.config import child_environment
from kvcached.ledger import Ledger

WORDS = st.sampled_from(
    [
        *("list", "doctor", "--json", "--device", "host:cli", "host:none", "cuda:0", "GPU-0", ""),
        *("-n", "0.05", "0", "nan", "-1", "1e999", "--strict", "--engine", "vllm", "--", "--help"),
        *("--device=", "--version", "\udcff", "9" * 40),
    ]
) | st.text(st.characters(exclude_characters="\0"), max_size=12)


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvcached.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment or None)


def test_version() -> None:
    done = _run("--version")
    assert (done.returncode, done.stdout) == (0, f"kvcached {kvcached.__version__}\n")


def test_help_has_examples() -> None:
    for command in ("demo", "list", "doctor", "exporter"):
        done = _run(command, "--help")
        assert done.returncode == 0
        assert "Examples" in done.stdout and f"kvcached {command}" in done.stdout


def test_list_shows_every_device_that_is_named(tmp_path: Path) -> None:
    names = [f"host:cli-{number}" for number in range(2)]
    ledgers = [Ledger.open(tmp_path / "ledger", name, 1 << 20) for name in names]
    accounts = [ledger.join("i", "both") for ledger in ledgers]
    where = {"KVCACHED_DIR": str(tmp_path / "ledger"), "KVCACHED_DEVICE": ",".join(names)}
    done = _run("list", **{**child_environment({}), **where})
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in names) and done.stdout.count("both") == 2
    done = _run("list", "--json", **{**child_environment({}), **where})
    assert [each["accounts"][0]["name"] for each in json.loads(done.stdout)["devices"]] == [
        "both"
    ] * 2
    for each in (*accounts, *ledgers):
        each.close()


def test_errors_are_said_by_the_program_that_was_called(tmp_path: Path) -> None:
    folder = tmp_path / "ledger"
    with Ledger.open(folder, "host:cli", 1 << 20):
        (folder / "ledger-host-old").write_bytes(b"KVCLEDGR" + b"\x01" + bytes(200))
        done = _run("list", **{**child_environment({}), "KVCACHED_DIR": str(folder)})
    assert done.returncode == 1 and "host:cli" in done.stdout
    assert done.stderr.startswith("kvcached: ") and done.stderr.count("\n") == 1


def test_a_shell_completes_commands_and_devices(tmp_path: Path) -> None:
    def complete(words: str) -> str:
        asked = {
            "_KVCACHED_COMPLETE": "complete_zsh",
            "_TYPER_COMPLETE_ARGS": words,
            "KVCACHED_DIR": str(tmp_path / "ledger"),
        }
        return _run(**{**child_environment({}), **asked}).stdout

    with Ledger.open(tmp_path / "ledger", "host:cli", 1 << 20):
        assert "host" in complete("kvcached list --device ho")
        assert "exporter" in complete("kvcached exp")


def test_bench_help_has_examples() -> None:
    for command in ("alloc", "engine"):
        done = _run("bench", command, "--help")
        assert done.returncode == 0
        assert "Examples" in done.stdout and f"kvcached bench {command}" in done.stdout


def test_what_a_command_started_ends_with_it_when_it_is_terminated() -> None:
    program = """
import time
from kvcached.cli.edge import run

def command():
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        print("engines ended", flush=True)

run("kvcached", command)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    process.terminate()
    said, _ = process.communicate(timeout=30)
    assert (process.returncode, said) == (128 + signal.SIGTERM, "engines ended\n")


def test_a_wrong_size_is_one_line() -> None:
    done = _run("demo", "--budget", "much")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "--budget" in done.stderr and "much" in done.stderr


def test_a_wrong_variable_is_one_line(tmp_path: Path) -> None:
    done = _run("list", KVCACHED_DEVICE="host:", PATH="/usr/bin")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "KVCACHED_DEVICE" in done.stderr


@pytest.mark.parametrize(
    ("program", "first"), [("kvtop", "--once"), ("kvcached", "list"), ("kvcached", "doctor")]
)
@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(words=st.lists(WORDS, max_size=4))
def test_no_words_end_in_a_traceback(
    program: str, first: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = {"kvtop": kvtop.main, "kvcached": main.main}[program]
    with Ledger.open(tmp_path / "ledger", "host:cli", 1 << 20), pytest.MonkeyPatch.context() as on:
        on.setenv("KVCACHED_DIR", str(tmp_path / "ledger"))
        on.setattr("kvcached.cli.top.command._ONCE_S", 0.01)
        on.setattr(sys, "argv", [program, first, *words])
        with pytest.raises(SystemExit) as ended:
            entry()
    out, err = capsys.readouterr()
    assert ended.value.code in (0, 1, 2) and "Traceback" not in out + err
    # The doctor says what is wrong on stdout.
    assert err.count("\n") == (ended.value.code != 0 and not (first == "doctor" and out != ""))
