"""The command line: version, help, and errors of ours as one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import kvcached
from kvcached.config import child_environment


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
    from kvcached.ledger import Ledger

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
    from kvcached.ledger import Ledger

    folder = tmp_path / "ledger"
    with Ledger.open(folder, "host:cli", 1 << 20):
        (folder / "ledger-host-old").write_bytes(b"KVCLEDGR" + b"\x01" + bytes(200))
        done = _run("list", **{**child_environment({}), "KVCACHED_DIR": str(folder)})
    assert done.returncode == 1 and "host:cli" in done.stdout
    assert done.stderr.startswith("kvcached: ") and done.stderr.count("\n") == 1


def test_a_shell_completes_commands_and_devices(tmp_path: Path) -> None:
    from kvcached.ledger import Ledger

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


def test_a_wrong_size_is_one_line() -> None:
    done = _run("demo", "--budget", "much")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "--budget" in done.stderr and "much" in done.stderr


def test_a_wrong_variable_is_one_line(tmp_path: Path) -> None:
    done = _run("list", KVCACHED_DEVICE="host:", PATH="/usr/bin")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "KVCACHED_DEVICE" in done.stderr
