"""``kvctl list``, ``watch``, ``delete``, completion; who may only read; wrong words and files."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kvctl_runs import Run, spawn, validator
from ledger_process import CAPACITY, Remote, wait_until

from kvcached import events
from kvcached.cli import kvctl
from kvcached.cli.edge import one_line
from kvcached.ledger import Ledger
from kvcached.units import MIB

DEVICE = "host:test"
FULL = 64  # instances that a ledger holds


@pytest.fixture
def ledger(folder: Path) -> Iterator[Ledger]:
    with Ledger.open(folder, DEVICE, CAPACITY) as opened:
        yield opened


@contextlib.contextmanager
def start(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "kvcached.cli.kvctl", *arguments]
    # A shell's background job ignores Ctrl-C, and what pytest starts there would, too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
        )
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        try:
            yield process
        finally:
            process.kill()


def test_list_of_64_instances_answers_in_a_tenth_of_a_second(ledger: Ledger) -> None:
    accounts = [ledger.join(f"id-{n}", f"model-{n}") for n in range(FULL)]
    took_s: list[float] = []
    # The fastest of some: what a busy machine adds is not the command's.
    while len(took_s) < 5 or (min(took_s) >= 0.1 and len(took_s) < 30):
        start_s = time.monotonic()
        done = spawn("list")
        took_s.append(time.monotonic() - start_s)
    assert done.code == 0 and len(done.out.splitlines()) == FULL + 2
    print(f"list of {FULL}: {[round(took * 1e3) for took in sorted(took_s)]} ms")
    assert min(took_s) < 0.1
    assert len(spawn("list", "--json").json["devices"][0]["accounts"]) == FULL
    for account in accounts:
        account.close()


def test_list_brings_no_typer_no_rich_and_no_engine(ledger: Ledger) -> None:
    script = (
        "import sys; from kvcached.cli import kvctl\n"
        "sys.argv = ['kvctl', 'list', '--device', 'host:test']\n"
        "try: kvctl.main()\n"
        "finally: print({*sys.modules} & {'typer', 'click', 'rich', 'pydantic', 'torch', 'vllm',"
        " 'numpy', 'prometheus_client', 'textual'}, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.startswith(DEVICE) and done.stderr.strip() == "set()"


def test_a_broken_ledger_does_not_hide_the_others(ledger: Ledger, folder: Path, run: Run) -> None:
    (folder / "ledger-host-old").write_bytes(b"KVCLEDGR" + b"\x01" + bytes(200))
    done = run("list", "--json")
    assert done.code == 1 and done.json["devices"][0]["device"] == DEVICE
    assert done.err.count("\n") == 1 and "layout version 1" in done.err


def test_names_cannot_move_the_terminals_cursor(ledger: Ledger, run: Run) -> None:
    account = ledger.join("id", "evil\x1b[2J\nname")
    done = run("list")
    assert "\x1b" not in done.out and len(done.out.splitlines()) == 3
    assert r"evil\x1b[2J name" in done.out
    assert one_line("a\tb\n c") == "a b c"
    account.close()


def test_watch_tells_what_happens_line_by_line(ledger: Ledger, folder: Path) -> None:
    with start("watch", "-n", "0.02", "--events", "--json") as watch:
        assert watch.stdout is not None

        def next_kind() -> str:
            event = json.loads(watch.stdout.readline())
            validator().validate(event)
            return str(event["event"])

        assert next_kind() == "ledger"
        remote = Remote(folder, DEVICE)
        remote.run("account = ledger.join('id', 'chat')", "account.set_ready()")
        seen = [next_kind()]
        if seen == ["joined"]:
            seen.append(next_kind())
        assert seen == ["joined", "ready"]
        ledger.set_limit("chat", MIB)
        assert next_kind() == "limit"
        remote.run("account.set_demand(2 << 20)", "account.lease(2 << 20)")
        assert next_kind() == "refused"
        remote.kill()
        assert next_kind() == "died"
        wait_until(lambda: ledger.reap() > 0)
        assert next_kind() == "reaped"
        watch.send_signal(signal.SIGINT)
        assert watch.wait(10) == 130 and watch.stderr is not None and watch.stderr.read() == ""


def test_watch_repeats_the_list(ledger: Ledger, run: Run) -> None:
    assert run("watch", "-n", "0.01", "--count", "3").out.count(DEVICE) == 3
    looks = run("watch", "-n", "0.01", "--count", "2", "--json").lines
    assert [look["devices"][0]["capacity"] for look in looks] == [CAPACITY, CAPACITY]
    assert looks[1]["time_s"] >= looks[0]["time_s"]
    text = run("watch", "-n", "0.01", "--count", "1", "--events").out
    assert text.endswith("host:test: ledger (capacity 100 MiB)\n")


def test_watch_waits_for_the_first_engine(folder: Path) -> None:
    with start("watch", "-n", "0.02", "--events", "--json") as watch:
        assert watch.stdout is not None and watch.stderr is not None
        assert "no device is shared here" in watch.stderr.readline()
        with Ledger.open(folder, DEVICE, CAPACITY):
            assert json.loads(watch.stdout.readline())["event"] == "ledger"


def test_a_reader_that_ends_ends_the_watch_without_a_word(ledger: Ledger) -> None:
    with start("watch", "-n", "0.01") as watch:
        assert watch.stdout is not None and watch.stderr is not None
        watch.stdout.readline()
        watch.stdout.close()
        assert watch.wait(10) == 1 and watch.stderr.read() == ""


def test_delete_clears_the_dead_and_never_the_living(
    ledger: Ledger, folder: Path, run: Run
) -> None:
    alive = ledger.join("id-a", "alive")
    assert run("delete").out == f"{DEVICE}: nothing is dead\n"
    refused = run("delete", "alive")
    assert refused.code == 2 and f"process {os.getpid()}" in refused.err
    remote = Remote(folder, DEVICE)
    remote.run("account = ledger.join('id-d', 'dead')")
    remote.kill()
    wait_until(lambda: not ledger.snapshot().accounts[1].alive)
    assert "dead (dead)" in run("list").out
    done = run("delete", "dead", "--json").json
    assert done["accounts"] == [{"instance": "id-d", "name": "dead"}]
    assert [account.name for account in ledger.snapshot().accounts] == ["alive"]
    assert "no instance dead" in run("delete", "dead").err
    alive.close()


def test_delete_removes_a_ledger_only_when_nobody_has_it_open(folder: Path, run: Run) -> None:
    with Ledger.open(folder, DEVICE, CAPACITY):
        refused = run("delete", "--ledger", "--device", DEVICE)
        assert refused.code == 2 and "have this ledger open" in refused.err
    assert run("delete", "--ledger").code == 2
    assert run("delete", "--ledger", "--device", DEVICE, "--json").json["ledger"] is True
    assert list(folder.iterdir()) == []
    assert run("delete", "--ledger", "--device", DEVICE).code == 1
    (folder / "ledger-host-test").write_text("a diary")
    foreign = run("delete", "--ledger", "--device", DEVICE)
    assert foreign.code == 1 and "left alone" in foreign.err
    old = b"KVCLEDGR" + b"\x01" + bytes(200)
    (folder / "ledger-host-test").write_bytes(old)
    assert run("delete", "--ledger", "--device", DEVICE).code == 0


def test_who_opens_while_a_ledger_is_removed_gets_a_ledger_that_exists(folder: Path) -> None:
    """Removed again and again while it is opened: nobody works on a file without a name."""
    remover = (
        "import sys\nfrom kvcached.vmm_ops import remove_ledger\n"
        "from kvcached.errors import KvcachedError\n"
        "removed = 0\n"
        "while removed < 30:\n"
        "    try: remove_ledger(sys.argv[1], 'host:test')\n"
        "    except KvcachedError: continue\n"
        "    removed += 1\n"
    )
    opened, end_s = 0, time.monotonic() + 60
    with subprocess.Popen([sys.executable, "-c", remover, str(folder)]) as process:
        while process.poll() is None and time.monotonic() < end_s:
            with Ledger.open(folder, DEVICE, CAPACITY) as mine:
                assert mine.path.stat().st_ino == os.fstat(mine.lock_fd).st_ino
                opened += 1
        process.kill()
    assert process.returncode == 0, "it was removed often enough"
    print(f"opened {opened} times while it was removed 30 times")


def as_nobody(*arguments: str) -> tuple[str, ...]:
    return ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *arguments)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can run a command as somebody else")
def test_who_may_not_write_may_still_read(ledger: Ledger, folder: Path) -> None:
    account = ledger.join("id", "chat")
    for path in (*folder.parents[:3], folder):
        path.chmod(0o755)
    ledger.path.chmod(0o644)
    kvctl_as = as_nobody(sys.executable, "-m", "kvcached.cli.kvctl")

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*kvctl_as, *words], capture_output=True, text=True)

    probe = subprocess.run([*as_nobody(sys.executable, "-c", "import kvcached")])
    if probe.returncode != 0:
        pytest.skip("this checkout cannot be read by another user")
    listed = call("list")
    assert listed.returncode == 0 and "chat" in listed.stdout and "dead" not in listed.stdout
    assert call("watch", "--count", "1").returncode == 0
    for words in (("limit", "chat", "1MiB"), ("delete",), ("reserve", "1MiB")):
        refused = call(*words)
        assert refused.returncode == 1 and refused.stderr.count("\n") == 1
        assert "belongs to user 0, not to user 65534" in refused.stderr
    ledger.path.chmod(0o600)
    unreadable = call("list")
    assert unreadable.returncode == 1 and "Permission denied" in unreadable.stderr
    assert unreadable.stderr.count("\n") == 1
    account.close()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands_and_names(ledger: Ledger, shell: str) -> None:
    accounts = [ledger.join(name, name) for name in ("chat", "code", "batch")]

    def complete(words: str) -> str:
        asked = {
            "_KVCTL_COMPLETE": f"complete_{shell}",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
            "_TYPER_COMPLETE_ARGS": words,
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        }
        return spawn(env={**os.environ, **asked}).out

    names = complete("kvctl limit c")
    assert "chat" in names and "code" in names and "batch" not in names
    assert "limit-percent" in complete("kvctl lim")
    # Not the shell that runs the tests, which typer would look for.
    named = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    script = spawn("--show-completion", shell, env=named)
    assert f"_KVCTL_COMPLETE=complete_{shell}" in script.out
    for account in accounts:
        account.close()


def test_the_schema_knows_every_kind_of_event() -> None:
    kinds = validator().schema["$defs"]["event"]["properties"]["event"]["enum"]
    assert set(kinds) == set(events.KINDS)


COMMAND_WORDS = st.sampled_from(
    [
        *("list", "watch", "limit", "limit-percent", "guarantee", "weight", "reclaim", "delete"),
        *("chat", "--json", "--device", DEVICE, "host:none", "--count", "1", "-n", "0.01", "none"),
        *(
            "--events",
            "--ledger",
            "512M",
            "2GiB",
            "40%",
            "-1",
            "0",
            "1e999",
            "nan",
            "inf",
            "9" * 40,
        ),
        *("9" * 400 + "T", "--", "-", "", "--device=", "--help", "cuda:0", "cuda:999", "\udcff"),
    ]
)
ANY_WORDS = st.text(st.characters(exclude_characters="\0"), max_size=20)


@settings(
    deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(words=st.lists(COMMAND_WORDS | ANY_WORDS, max_size=6))
def test_no_words_end_in_a_traceback(
    words: list[str], ledger: Ledger, capsys: pytest.CaptureFixture[str]
) -> None:
    if {"reserve"} & {*words} or ("watch" in words and not {"--help"} & {*words}):
        words = [word for word in words if word not in ("reserve", "watch")]
    before = ledger.snapshot()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["kvctl", *words])
        with pytest.raises(SystemExit) as ended:
            kvctl.main()
    out, err = capsys.readouterr()
    code = ended.value.code
    assert code in (0, 1, 2)
    assert "Traceback" not in out + err
    if code:
        assert words == [] or err.count("\n") == 1
    assert ledger.snapshot().accounts == before.accounts


SETTINGS = st.sampled_from(["limit", "limit-percent", "guarantee", "weight", "reclaim"])


@settings(
    deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(command=SETTINGS, value=COMMAND_WORDS | ANY_WORDS | st.floats().map(str))
def test_any_value_is_taken_or_refused_in_one_line(
    command: str, value: str, ledger: Ledger, capsys: pytest.CaptureFixture[str]
) -> None:
    account = ledger.join("id", "chat")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvcached.control.ANSWER_S", 0.001)
        patch.setattr(sys, "argv", ["kvctl", command, "chat", "--json", "--", value])
        with pytest.raises(SystemExit) as ended:
            kvctl.main()
    out, err = capsys.readouterr()
    if ended.value.code in (0, 3):
        validator().validate(json.loads(out))
    else:
        assert ended.value.code == 2 and err.count("\n") == 1
    account.close()


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_damaged_ledger_is_listed_or_refused_in_one_line(
    data: st.DataObject, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "ledger-host-test"
    path.unlink(missing_ok=True)
    with Ledger.open(folder, DEVICE, CAPACITY) as ledger:
        account = ledger.join("id", "chat")
        image = bytearray(ledger.path.read_bytes())
        account.close()
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 4095))
        piece = data.draw(st.binary(min_size=1, max_size=64))
        image[at : at + len(piece)] = piece
    size = data.draw(st.sampled_from([len(image), len(image) - 1, 100, 0]))
    path.unlink()
    path.write_bytes(image[:size])
    path.chmod(0o600)
    for words in (["list"], ["list", "--json"], ["limit", "chat", "1MiB"], ["delete"]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("kvcached.control.EFFECT_S", 0.001)
            patch.setattr(sys, "argv", ["kvctl", *words])
            with pytest.raises(SystemExit) as ended:
                kvctl.main()
        out, err = capsys.readouterr()
        assert ended.value.code in (0, 1, 2) and err.count("\n") <= 1
        assert "Traceback" not in out + err
