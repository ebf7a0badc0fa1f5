"""Two versions of kvcached on one machine whose ledgers are laid out differently: each says what
stands in the way, neither touches the other's ledger, and docs/operating.md says how to drain one.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from kvctl_runs import Run

from kvcached import vmm_ops
from kvcached.errors import InvalidArgumentError, LedgerError
from kvcached.ledger import Ledger

DEVICE = "host:versions"
MIB = 1 << 20
OTHER = 77
VERSION_OFFSET = 8
ENGINE = """
import pathlib, sys
from kvcached.ledger import Ledger
ledger = Ledger.open(pathlib.Path(sys.argv[1]), sys.argv[2], 64 << 20)
account, member = ledger.join("x", "old"), ledger.attach("x", "old")
assert account.lease(8192)
member.created(4096)
for line in sys.stdin:
    assert account.lease(4096) and account.charge() > 0
    account.give_back(4096)
    print("works", flush=True)
"""


class Engine:
    """An engine of the other version, at work: as far as the file says."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", ENGINE, str(folder), DEVICE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.works()
        path = folder / vmm_ops.ledger_file_name(DEVICE)
        with path.open("r+b") as file:
            file.seek(VERSION_OFFSET)
            self.own = struct.unpack("<I", file.read(4))[0]
            file.seek(VERSION_OFFSET)
            file.write(struct.pack("<I", OTHER))

    def works(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(b"go\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == b"works\n"

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setenv("KVCACHED_DIR", str(tmp_path / "ledger"))
    engine = Engine(tmp_path / "ledger")
    yield engine
    engine.end()


def test_the_other_version_is_refused_with_both_numbers(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "ledger" / vmm_ops.ledger_file_name(DEVICE)
    before = path.read_bytes()
    for read_only in (False, True):
        with pytest.raises(LedgerError) as refused:
            Ledger.open(tmp_path / "ledger", DEVICE, 64 * MIB, read_only=read_only)
        for what in (str(path), str(OTHER), str(engine.own), "stop the processes that use it"):
            assert what in str(refused.value)
    assert path.read_bytes() == before, "nothing of it was touched"
    engine.works()


def test_a_ledger_in_use_is_not_removed(engine: Engine, tmp_path: Path, run: Run) -> None:
    with pytest.raises(InvalidArgumentError, match="processes that live"):
        vmm_ops.remove_ledger(str(tmp_path / "ledger"), DEVICE)
    ran = run("delete", "--ledger", "--device", DEVICE)
    assert ran.code != 0 and "processes that live" in ran.err
    engine.works()


def test_drained_it_gives_way_to_a_new_one(engine: Engine, tmp_path: Path, run: Run) -> None:
    engine.end()
    with pytest.raises(LedgerError, match=str(OTHER)):
        Ledger.open(tmp_path / "ledger", DEVICE, 64 * MIB)
    ran = run("delete", "--ledger", "--device", DEVICE)
    assert ran.code == 0, ran.err
    assert os.listdir(tmp_path / "ledger") == []
    with Ledger.open(tmp_path / "ledger", DEVICE, 64 * MIB) as ledger:
        assert ledger.join("y", "new").lease(64 * MIB)


def test_two_folders_keep_two_versions_apart(engine: Engine, tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "new", DEVICE, 32 * MIB) as ledger:
        assert ledger.join("y", "new").lease(MIB)
    engine.works()
