"""Tools and engines in namespaces of their own, as in containers that share the ledgers' folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from kvctl_runs import Ran
from ledger_process import CAPACITY, Remote, wait_until

from kvcached.ledger import Ledger
from kvcached.units import MIB

DEVICE = "host:test"
OWN_PIDS = ("unshare", "--pid", "--fork", "--mount-proc")
READ_ONLY = (
    *("unshare", "--mount", "sh", "-c"),
    'mount --bind "$KVCACHED_DIR" "$KVCACHED_DIR" && mount -o remount,bind,ro "$KVCACHED_DIR" '
    '&& exec "$@"',
    "sh",
)

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can make namespaces")


@pytest.fixture
def ledger(folder: Path) -> Iterator[Ledger]:
    with Ledger.open(folder, DEVICE, CAPACITY) as opened:
        yield opened


@pytest.fixture
def engine(folder: Path, ledger: Ledger) -> Iterator[Remote]:
    """An engine that is process 1 of its own namespace."""
    remote = Remote(folder, DEVICE, *OWN_PIDS)
    try:
        remote.run("account = ledger.join('id', 'chat')", "account.set_ready()")
        yield remote
    finally:
        remote.kill()


def kvctl(inside: tuple[str, ...], *words: str) -> Ran:
    command = [*inside, sys.executable, "-m", "kvcached.cli.kvctl", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return Ran(done.returncode, done.stdout, done.stderr)


def test_kvctl_in_another_container_sees_and_steers_it(engine: Remote, ledger: Ledger) -> None:
    (account,) = kvctl(OWN_PIDS, "list", "--json").json["devices"][0]["accounts"]
    assert account["name"] == "chat" and account["alive"] and account["owner_pid"] == 1
    assert kvctl(OWN_PIDS, "limit", "chat", "8MiB", "--json").json["limit"] == 8 * MIB
    assert ledger.snapshot().accounts[0].limit == 8 * MIB
    refused = kvctl(OWN_PIDS, "delete", "chat")
    assert refused.code == 2 and "chat is alive" in refused.err


def test_its_death_is_seen_from_outside_and_from_beside(engine: Remote, ledger: Ledger) -> None:
    children = Path(f"/proc/{engine.pid}/task/{engine.pid}/children")
    os.kill(int(children.read_text()), signal.SIGKILL)
    wait_until(lambda: not ledger.snapshot().accounts[0].alive)
    assert "chat (dead)" in kvctl(OWN_PIDS, "list").out
    assert kvctl(OWN_PIDS, "delete", "--json").json["accounts"][0]["name"] == "chat"


def test_a_read_only_mount_is_enough_to_look(engine: Remote, ledger: Ledger) -> None:
    assert "chat" in kvctl(READ_ONLY, "list").out
    assert "joined" in kvctl(READ_ONLY, "watch", "--events", "--count", "1").out
    for words in (("limit", "chat", "8MiB"), ("delete",), ("reserve", "1MiB")):
        refused = kvctl(READ_ONLY, *words)
        assert refused.code == 1 and refused.err.count("\n") == 1
        assert "Read-only file system" in refused.err
    assert ledger.snapshot().accounts[0].limit is None
