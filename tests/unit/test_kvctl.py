"""``kvctl``: settings, reclaim and reserve, on a ledger whose engines are played."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kvctl_runs import Run
from ledger_process import wait_until
from page_pools import PAGE, PER_PAGE
from played_engine import Engine

from kvcached.ledger import Ledger

DEVICE = "host:test"
COMMANDS = (
    *("list", "watch", "limit", "limit-percent", "guarantee", "weight", "reclaim", "reserve"),
    "delete",
)
PAGES = 16


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    monkeypatch.setenv("KVCACHED_DIR", str(tmp_path / "ledger"))
    monkeypatch.delenv("KVCACHED_DEVICE", raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    with Ledger.open(tmp_path / "ledger", DEVICE, PAGES * PAGE) as opened:
        yield opened


@pytest.fixture
def engine(ledger: Ledger) -> Iterator[Engine]:
    """It holds 13 pages: its own one, 4 in use and 8 that it only caches."""
    played = Engine(ledger, "chat", cached_pages=8, used_pages=4)
    yield played
    played.close()


def test_list_shows_every_device_and_every_number(ledger: Ledger, engine: Engine, run: Run) -> None:
    (found,) = run("list", "--json").json["devices"]
    (account,) = found["accounts"]
    assert found["device"] == DEVICE and found["charge"] == 13 * PAGE == account["charge"]
    assert found["free"] == 3 * PAGE and account["misses"] == 12 * PER_PAGE
    table = run("list")
    assert table.code == 0 and "chat (starts)" in table.out and "832 KiB" in table.out
    engine.one.account.set_asleep(True)
    assert "chat (asleep)" in run("list").out
    with Ledger.open(ledger.path.parent, "host:other", PAGE):
        several = run("list", "--json").json["devices"]
        assert [each["device"] for each in several] == ["host:other", DEVICE]
        (one,) = run("list", "--device", "host:other", "--json").json["devices"]
        assert one["capacity"] == PAGE
        several = run("limit", "chat", "1MiB")
        assert several.code == 2 and "host:other" in several.err


def test_a_limit_takes_effect_at_once_and_says_what_is_left(engine: Engine, run: Run) -> None:
    start_s = time.monotonic()
    done = run("limit", "chat", f"{8 * PAGE}", "--json").json
    assert time.monotonic() - start_s < 1
    assert (done["limit"], done["above"]) == (8 * PAGE, 0) and done["charge"] <= 8 * PAGE
    drained = run("limit", "chat", "0")
    assert drained.code == 0 and "256 KiB above its limit are in use" in drained.out
    assert engine.one.charged_pages == 5
    assert run("limit", "chat", "none", "--json").json["limit"] is None


def test_a_percentage_is_of_the_capacity(engine: Engine, run: Run) -> None:
    done = run("limit-percent", "chat", "50", "--json").json
    assert (done["limit"], done["charge"]) == (8 * PAGE, 8 * PAGE)
    assert run("limit-percent", "chat", "101").code == 2


def test_guarantee_and_weight_are_set_or_refused(ledger: Ledger, engine: Engine, run: Run) -> None:
    other = ledger.join("other", "other")
    done = run("guarantee", "other", f"{6 * PAGE}", "--json").json
    assert done["guarantee"] == 6 * PAGE
    assert engine.one.charged_pages == 10, "what it only caches made room"
    assert other.lease(6 * PAGE)
    assert run("weight", "chat", "2.5", "--json").json["weight"] == 2.5
    late = run("guarantee", "other", f"{14 * PAGE}")
    assert late.code == 0 and "in use by others" in late.out
    refused = run("guarantee", "chat", f"{3 * PAGE}")
    assert refused.code == 2 and refused.err.count("\n") == 1 and "can be lent" in refused.err
    assert run("weight", "chat", "0").code == 2
    assert run("guarantee", "other", "512KiB").code == 0
    below = run("limit", "other", "0.25M")
    assert below.code == 2 and "a limit of 256 KiB is below its guarantee of 512 KiB" in below.err
    assert run("limit", "chat", "256KiB").code == 0
    above = run("guarantee", "chat", "320KiB")
    assert above.code == 2 and "a guarantee of 320 KiB is above its limit of 256 KiB" in above.err


def test_reclaim_takes_what_is_asked_for_or_all(engine: Engine, run: Run) -> None:
    done = run("reclaim", "chat", f"{2 * PAGE}", "--json").json
    assert (done["given"], done["charge"], done["answered"]) == (2 * PAGE, 11 * PAGE, True)
    rest = run("reclaim", "chat")
    assert rest.code == 0 and "gave 384 KiB and holds 320 KiB" in rest.out
    assert engine.one.charged_pages == 5


def test_an_engine_that_does_not_answer_is_said(
    ledger: Ledger, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvcached.control.ANSWER_S", 0.05)
    mute = ledger.join("mute", "mute")
    done = run("reclaim", "mute", "1MiB")
    assert done.code == 3 and "has not answered" in done.err
    mute.close()


def test_wrong_names_and_sizes_are_one_line(ledger: Ledger, engine: Engine, run: Run) -> None:
    for arguments, words in (
        (("limit", "chart", "1MiB"), "no instance chart; there are: chat"),
        (("limit", "chat", "much"), "'much'"),
        (("limit", "chat", "0.5"), "expected a size such as"),
        (("reserve", "1TiB"), "at most 960 KiB"),
        (("reserve", "1KiB", "--for", "4194304"), "No such process"),
        (("reserve", "1KiB", "--detach"), "--for PID"),
        (("list", "--device", "host:none"), "no ledger"),
    ):
        done = run(*arguments)
        assert done.code in (1, 2) and done.err.count("\n") == 1 and words in done.err, done.err


def test_names_of_several_are_refused(ledger: Ledger, run: Run) -> None:
    two = [ledger.join(instance, "same") for instance in ("id-1", "id-2")]
    assert "id-1, id-2" in run("weight", "same", "2").err
    assert run("weight", "id-2", "2", "--json").json["name"] == "same"
    for account in two:
        account.close()


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "kvcached.cli.kvctl", *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


def test_reserve_keeps_it_until_the_program_has_ended(ledger: Ledger, engine: Engine) -> None:
    with (
        sleeper() as program,
        start("reserve", f"{9 * PAGE}", "--for", str(program.pid), "--json") as holder,
    ):
        assert holder.stdout is not None
        said = json.loads(holder.stdout.readline())
        assert said["kept"] and said["size"] == 9 * PAGE and said["pid"] == holder.pid
        assert ledger.snapshot().set_aside == 9 * PAGE
        assert engine.one.charged_pages == 7
        program.kill()
        assert holder.wait(10) == 0
    assert ledger.snapshot().set_aside == 0


def test_reserve_can_leave_a_holder_behind(ledger: Ledger, engine: Engine) -> None:
    with sleeper() as program:
        with start("reserve", f"{9 * PAGE}", "--for", str(program.pid), "--detach") as command:
            assert command.stdout is not None
            assert "are free and kept" in command.stdout.readline()
            assert command.wait(10) == 0
        assert ledger.snapshot().set_aside == 9 * PAGE
        program.kill()
    wait_until(lambda: ledger.reap() == 0 and ledger.snapshot().set_aside == 0)


def test_reserve_says_who_uses_what_it_cannot_have(
    ledger: Ledger, engine: Engine, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvcached.cli.reserving.GRACE_S", 0.1)
    done = run("reserve", f"{13 * PAGE}")
    assert done.code == 3 and "chat 320 KiB (320 KiB in use)" in done.err
    waited = run("reserve", f"{13 * PAGE}", "--wait", "--timeout", "0.1", "--json")
    assert waited.code == 3 and waited.json["kept"] is False
    with sleeper() as program:
        late = run("reserve", f"{13 * PAGE}", "--for", str(program.pid), "--detach")
        assert late.code == 3
        program.kill()
    assert ledger.snapshot().set_aside == 0 and len(ledger.snapshot().accounts) == 1


def test_it_starts_quickly_and_brings_no_engine() -> None:
    script = "import sys, kvcached.cli.kvctl; print({'torch', 'vllm', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


def test_every_command_has_examples_and_json() -> None:
    environment = {**os.environ, "COLUMNS": "100"}
    for command in COMMANDS:
        done = subprocess.run(
            [sys.executable, "-m", "kvcached.cli.kvctl", command, "--help"],
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.returncode == 0
        assert "Examples" in done.stdout and "--json" in done.stdout
        assert f"kvctl {command}" in done.stdout
