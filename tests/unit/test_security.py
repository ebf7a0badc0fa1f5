"""What docs/security.md promises and no other test shows."""

from __future__ import annotations

import ast
import logging
import os
import signal
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcached import vmm_ops
from kvcached.errors import LedgerError
from kvcached.ledger import Ledger

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "src" / "kvcached").rglob("*.py"))
DEVICE = "host:security"
MIB = 1 << 20
HEADER, ROW, MEMBERS = 640, 1536, 512  # bytes (segment_layout.hpp)

# They run code that comes as data.
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "jsonpickle"}
FORBIDDEN_CALLS = {"eval", "exec", "os.system", "os.popen", "yaml.load", "torch.load", "mktemp"}


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "ledger", DEVICE, 64 * MIB) as opened:
        yield opened


def calls(tree: ast.AST) -> Iterator[tuple[int, str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func), node


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_data_is_run(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        assert not {name.partition(".")[0] for name in names} & FORBIDDEN_MODULES, names
    for line, name, call in calls(tree):
        assert name not in FORBIDDEN_CALLS, f"{line}: {name}"
        shell = [word.value for word in call.keywords if word.arg == "shell"]
        assert not shell, f"{line}: {name} starts a shell"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_tokens_are_compared_in_constant_time_and_not_written_anywhere(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq | ast.NotEq):
            named = {
                ast.unparse(side).rpartition(".")[2] for side in (node.left, *node.comparators)
            }
            secrets = {"token", "expected_token", "secret", "password", "authorization", "api_key"}
            assert not named & secrets, f"{node.lineno}: {ast.unparse(node)}"
    for line, name, call in calls(tree):
        if name.startswith(("logger.", "logging.", "print", "typer.echo")):
            said = {ast.unparse(part) for part in call.args[1:]} | {
                ast.unparse(part.value)
                for text in call.args
                if isinstance(text, ast.JoinedStr)
                for part in text.values
                if isinstance(part, ast.FormattedValue)
            }
            assert not {"token", "self.token", "server.token"} & said, f"{line}: {said}"


def test_what_is_created_is_closed_to_others_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        with Ledger.open(tmp_path / "ledger", DEVICE, MIB) as opened:
            paths = [opened.path, opened.path.parent]
            backend = vmm_ops.host_backend("security", opened.lock_fd)
            arena = vmm_ops.Arena(backend, [(0, 4096)], 1, 4096)
            arena.map([0])
            descriptors = [
                int(name)
                for name in os.listdir("/proc/self/fd")
                if "memfd:kvcached:security" in _target(f"/proc/self/fd/{name}")
            ]
            assert descriptors
            for fd in descriptors:
                assert not os.get_inheritable(fd), "a program that is started could read the pages"
            del arena
    finally:
        os.umask(old)
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def _target(link: str) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""  # of the listing itself


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_another_user_reaches_neither_the_ledger_nor_the_pages(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:3]:
        parent.chmod(parent.stat().st_mode | 0o111)
    with Ledger.open(tmp_path / "ledger", DEVICE, MIB) as opened:
        backend = vmm_ops.host_backend("security-2", opened.lock_fd)
        arena = vmm_ops.Arena(backend, [(0, 4096)], 1, 4096)
        arena.map([0])
        (fd,) = [
            name
            for name in os.listdir("/proc/self/fd")
            if "memfd:kvcached:security-2" in _target(f"/proc/self/fd/{name}")
        ]
        targets = [
            str(opened.path), f"/proc/{os.getpid()}/fd/{fd}", f"/proc/{os.getpid()}/mem",
            str(opened.path.parent / "ledger-host-new"),
        ]  # fmt: skip
        for target in targets:
            for flags in (os.O_RDONLY, os.O_RDWR, os.O_RDWR | os.O_CREAT):
                assert as_nobody(target, flags) == "refused", (target, flags)
        del arena


def as_nobody(target: str, flags: int) -> str:
    child = os.fork()
    if child == 0:
        os.setgid(65534)
        os.setuid(65534)
        try:
            os.open(target, flags, 0o600)
        except OSError:
            os._exit(3)
        os._exit(0)
    return "refused" if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3 else "opened"


def test_a_process_id_that_is_used_again_keeps_no_row_alive(ledger: Ledger) -> None:
    """Rows name processes for people; who lives is told by locks alone."""
    program = (
        "import sys, pathlib; from kvcached.ledger import Ledger;"
        "l = Ledger.open(pathlib.Path(sys.argv[1]), sys.argv[2]);"
        "m = l.attach('x', 'x'); a = l.join('x', 'x'); a.lease(4096); m.created(4096);"
        "print('there', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(ledger.path.parent), DEVICE],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout is not None and child.stdout.readline() == b"there\n"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    # As if this very process, which lives, had got the number of the dead one.
    with ledger.path.open("r+b") as file:
        for offset in (HEADER + 192 + 4, HEADER + MEMBERS + 4):
            file.seek(offset)
            file.write(struct.pack("<I", os.getpid()))
    (account,) = ledger.snapshot().accounts
    assert account.owner_pid == os.getpid() and not account.owner_alive
    assert ledger.reap() == 2
    assert ledger.snapshot().accounts == ()


def test_accounts_run_out_in_words_and_come_back(ledger: Ledger, tmp_path: Path) -> None:
    """One user can take all rows of his own ledger; that is said, and harms no other ledger."""
    taken = [ledger.join(f"instance-{number}", "many") for number in range(64)]
    with pytest.raises(LedgerError, match="all 64 accounts belong to living instances"):
        ledger.join("one more", "many")
    with Ledger.open(tmp_path / "other", DEVICE, MIB) as other:
        other.join("unharmed", "unharmed").close()
    taken[7].close()
    ledger.join("one more", "many").close()


def test_members_run_out_in_words(ledger: Ledger) -> None:
    members = [ledger.attach("crowd", "crowd") for _ in range(16)]
    with pytest.raises(LedgerError, match="16 living members already"):
        ledger.attach("crowd", "crowd")
    members[3].close()
    ledger.attach("crowd", "crowd").close()


def test_a_folder_that_another_user_made_first_is_refused_by_name(tmp_path: Path) -> None:
    """Somebody squats on the name that kvcached would use."""
    squatted = tmp_path / "kvcached-1000"
    target = tmp_path / "elsewhere"
    target.mkdir(mode=0o700)
    squatted.symlink_to(target)
    with pytest.raises(LedgerError, match="kvcached-1000"):
        Ledger.open(squatted, DEVICE, MIB)
    assert list(target.iterdir()) == []
    if os.geteuid() == 0:
        squatted.unlink()
        squatted.mkdir(mode=0o700)
        os.chown(squatted, 65534, 65534)
        with pytest.raises(LedgerError, match="belongs to user 65534"):
            Ledger.open(squatted, DEVICE, MIB)


def test_memory_of_a_tenant_that_died_reads_as_zeros_for_the_next(tmp_path: Path) -> None:
    """Of the host; of a GPU tests/gpu/test_cuda_tenants.py shows the same."""
    program = (
        "import ctypes, sys; from kvcached import vmm_ops;"
        "b = vmm_ops.host_backend('tenant'); n = 64;"
        "a = vmm_ops.Arena(b, [(0, 65536)], n, n * 65536); a.map(list(range(n)));"
        "size = n * 65536;"
        "data = ctypes.string_at(a.address, size);"
        "print(data == bytes(size), flush=True);"
        "ctypes.memset(a.address, 0xA5, size); sys.stdin.read()"
    )
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert child.stdout is not None and child.stdout.readline() == b"True\n"
        child.kill()
        child.communicate()


def test_the_exporter_never_says_its_token(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("prometheus_client")
    token = "a-token-that-nobody-may-see-0123456789"
    token_file = tmp_path / "token"
    token_file.write_text(token)
    monkeypatch.setenv("KVCACHED_DIR", str(tmp_path / "ledger"))
    with Ledger.open(tmp_path / "ledger", DEVICE, MIB):
        process = subprocess.Popen(
            [sys.executable, "-m", "kvcached.cli.main", "exporter", "--port", "0",
             "--token-file", str(token_file)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            address = line.split("metrics on ")[1].split("/metrics")[0]
            said = []
            for given in ("wrong", token[:-1], token):
                answer = httpx.post(
                    f"{address}/api/v1/limit", headers={"Authorization": f"Bearer {given}"},
                    json={"nonsense": 1},
                )  # fmt: skip
                said.append(answer.text)
                assert (answer.status_code == 401) == (given != token), answer.text
            for page in ("/metrics", "/api/v1/state", "/"):
                said.append(httpx.get(address + page).text)
        finally:
            process.terminate()
            rest, _ = process.communicate(timeout=20)
        with caplog.at_level(logging.DEBUG):
            assert not any(token in text for text in [*said, line, rest, caplog.text])


def test_waiting_is_not_spinning(ledger: Ledger) -> None:
    """An instance that can get nothing costs its neighbours no processor."""
    account = ledger.join("waits", "waits")
    before = os.times()
    account.wait_freed(account.freed_seq, 0.5)
    after = os.times()
    assert (after.user + after.system) - (before.user + before.system) < 0.2
