"""The ledger's file: what is created, and what is refused instead of crashing."""

from __future__ import annotations

import os
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from kvcached import vmm_ops
from kvcached.errors import InvalidArgumentError, LedgerError
from kvcached.ledger import Ledger

MIB = 1 << 20
DEVICE = "host:test"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "run" / "kvcached"


def create(directory: Path, capacity: int = 100 * MIB, headroom: int = 0) -> Ledger:
    return Ledger.open(directory, DEVICE, capacity, headroom)


def test_creates_folder_and_file_for_this_user_only(directory: Path) -> None:
    os.umask(umask := os.umask(0))
    with create(directory, headroom=10 * MIB) as ledger:
        assert ledger.path == directory / "ledger-host-test"
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700 & ~umask
        assert stat.S_IMODE(ledger.path.stat().st_mode) == 0o600 & ~umask
        assert (ledger.device, ledger.capacity, ledger.headroom) == (DEVICE, 100 * MIB, 10 * MIB)
        assert os.listdir(directory) == ["ledger-host-test"]
        assert ledger.path.stat().st_blocks * 512 >= ledger.path.stat().st_size  # no holes


def test_a_later_opener_takes_what_is_there(directory: Path) -> None:
    with create(directory, headroom=MIB), Ledger.open(directory, DEVICE) as second:
        assert (second.capacity, second.headroom) == (100 * MIB, MIB)


def test_another_capacity_is_refused_with_both_numbers(directory: Path) -> None:
    with create(directory), pytest.raises(LedgerError, match=rf"{100 * MIB}.*{50 * MIB}"):
        create(directory, 50 * MIB)


def test_no_capacity_and_no_file(directory: Path) -> None:
    with pytest.raises(LedgerError, match="no capacity"):
        Ledger.open(directory, DEVICE)
    with pytest.raises(LedgerError, match="no ledger"):
        Ledger.open(directory, DEVICE, 100 * MIB, create=False)


@pytest.mark.parametrize(("capacity", "headroom"), [(0, 0), (-5, 0), (10, 10), (10, 20), (10, -1)])
def test_senseless_sizes(directory: Path, capacity: int, headroom: int) -> None:
    with pytest.raises(InvalidArgumentError):
        create(directory, capacity, headroom)
    assert not directory.exists()


@pytest.mark.parametrize("size", [0, 3, 11, 40, 100, 4096])
def test_a_cut_file_is_refused(directory: Path, size: int) -> None:
    with create(directory) as ledger:
        path = ledger.path
    os.truncate(path, size)
    with pytest.raises(LedgerError, match=rf"{path}.*{size} bytes.*version 5"):
        Ledger.open(directory, DEVICE)
    assert path.stat().st_size == size


def test_a_file_cut_while_open_is_an_error(directory: Path) -> None:
    with create(directory) as ledger:
        account = ledger.join("i", "n")
        os.truncate(ledger.path, 4096)
        for operation in (ledger.snapshot, ledger.reap, lambda: ledger.join("j", "n")):
            with pytest.raises(LedgerError, match=r"cut.*4096"):
                operation()
        os.truncate(ledger.path, 0)
        account.close()


def test_foreign_and_other_versions_are_refused(directory: Path) -> None:
    with create(directory) as ledger:
        path = ledger.path
    good = path.read_bytes()
    path.write_bytes(b"#!/bin/sh" + good[9:])
    with pytest.raises(LedgerError, match=rf"{path}.*not a ledger.*version 5"):
        Ledger.open(directory, DEVICE)
    path.write_bytes(good[:8] + struct.pack("<I", 77) + good[12:])
    with pytest.raises(LedgerError, match=rf"{path}.*version 77.*program's 5"):
        Ledger.open(directory, DEVICE)
    path.write_bytes(good)
    Ledger.open(directory, DEVICE).close()


def test_another_devices_file_is_refused(directory: Path) -> None:
    with create(directory) as ledger:
        os.rename(ledger.path, directory / vmm_ops.ledger_file_name("host:b"))
    with pytest.raises(LedgerError, match=r"host:test.*host:b"):
        Ledger.open(directory, "host:b", 100 * MIB)


def test_links_folders_and_pipes_are_refused(directory: Path, tmp_path: Path) -> None:
    with create(directory) as ledger:
        path = ledger.path
    link = tmp_path / "link"
    link.symlink_to(directory)
    for spelling in (link, Path(f"{link}/")):
        with pytest.raises(LedgerError, match=str(link)):
            Ledger.open(spelling, DEVICE)
    with pytest.raises(LedgerError, match=r"cannot open the ledger's folder"):
        vmm_ops.Segment.open(f"{link}//", DEVICE, -1, 0, True, False)
    os.rename(path, tmp_path / "real")
    path.symlink_to(tmp_path / "real")
    with pytest.raises(LedgerError, match="symbolic link"):
        Ledger.open(directory, DEVICE, 100 * MIB)
    path.unlink()
    path.mkdir()
    with pytest.raises(LedgerError, match=str(path)):
        Ledger.open(directory, DEVICE, 100 * MIB)
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(LedgerError, match="regular file"):
        Ledger.open(directory, DEVICE, 100 * MIB)


def test_a_folder_that_others_may_change_is_refused(directory: Path) -> None:
    create(directory).close()
    directory.chmod(0o777)
    with pytest.raises(LedgerError, match="other users"):
        Ledger.open(directory, DEVICE)
    directory.chmod(0o700)
    (directory / "ledger-host-test").chmod(0o666)
    with pytest.raises(LedgerError, match="other users"):
        Ledger.open(directory, DEVICE)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "file" / "x" / "y"):
        with pytest.raises(LedgerError, match=str(folder)):
            create(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_a_folder_of_another_user_is_refused(directory: Path) -> None:
    create(directory).close()
    os.chown(directory, 12345, -1)
    with pytest.raises(LedgerError, match=r"user 12345, not to user 0"):
        Ledger.open(directory, DEVICE)


def test_reading_needs_no_write_permission(directory: Path, tmp_path: Path) -> None:
    with create(directory) as ledger:
        account = ledger.join("one", "chat", 2 * MIB)
        assert account.lease(3 * MIB)
        ledger.path.chmod(0o400)
        with Ledger.open(directory, DEVICE, read_only=True) as reader:
            (seen,) = reader.snapshot().accounts
            assert (seen.name, seen.leased, seen.owner_alive) == ("chat", 3 * MIB, True)
            for operation in (reader.reap, lambda: reader.join("two", "n")):
                with pytest.raises(LedgerError, match="reading only"):
                    operation()
            seq = reader.core.freed_seq
            assert reader.core.wait_freed(seq, 0.01) == seq
    missing = tmp_path / "missing"
    with pytest.raises(LedgerError, match=str(missing)):
        Ledger.open(missing, DEVICE, 100 * MIB, read_only=True)
    assert not missing.exists()


def test_every_device_has_its_own_file_name() -> None:
    devices = [
        "host:demo", "host-demo", "host demo", "host:de:mo", "host/demo", ":demo", "-demo",
        "Host:demo", "Host-demo", "GPU-1234-ab", "GPU:1234-ab", "..", "/", "gpu é", "host:../x",
    ]  # fmt: skip
    names = [vmm_ops.ledger_file_name(device) for device in devices]
    assert len(set(names)) == len(names)
    assert not any("/" in name for name in names)
    assert names[0] == "ledger-host-demo"
    assert vmm_ops.ledger_file_name("GPU-1234-ab") == "ledger-GPU-1234-ab"


def test_one_of_several_creators_wins(directory: Path) -> None:
    program = (
        "import sys, pathlib; from kvcached.ledger import Ledger; sys.stdin.readline();"
        "ledger = Ledger.open(pathlib.Path(sys.argv[1]), 'host:test', 1 << 30);"
        "account = ledger.join(sys.argv[2], 'n'); account.lease(1);"
        "print('open', flush=True); sys.stdin.readline()"
    )
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(directory), str(i)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(4)
    ]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "open\n"
    with Ledger.open(directory, DEVICE, 1 << 30) as ledger:
        assert len(ledger.snapshot().accounts) == 4
    assert os.listdir(directory) == ["ledger-host-test"]
    for racer in racers:
        racer.communicate("end\n")
