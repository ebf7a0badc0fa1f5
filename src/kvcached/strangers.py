"""Whether one ledger really governs a device: who maps another one, and who uses a GPU beside it.

Containers that mount different folders make a ledger each, and each of them lends the whole device.
The kernel tells which file a process maps, and the driver which processes use a GPU.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from kvcached.snapshot import LedgerSnapshot

_DELETED = " (deleted)"
# Addresses, permissions and offset; device, inode and path. An engine has thousands of lines.
_LINE = re.compile(
    rb"^\S+ \S+ \S+ (\S+) (\d+) +(/\S[^\n]*/ledger-(?:host|GPU|MIG)-[^/\n]*)$", re.MULTILINE
)


@dataclass(frozen=True, slots=True)
class MappedLedger:
    """A ledger's file, and the processes that map it."""

    file_name: str
    path: str
    """As its processes see it: in a container, where it is mounted there."""
    identity: tuple[str, str]
    """The kernel's device and inode: the same for the same file, wherever it is mounted."""
    deleted: bool
    pids: tuple[int, ...]


def mapped_ledgers(proc: Path = Path("/proc")) -> tuple[list[MappedLedger], int]:
    """The ledgers that processes map now, and how many processes could not be looked at because
    they belong to others.
    """
    pids: dict[tuple[str, str], set[int]] = {}
    paths: dict[tuple[str, str], str] = {}
    refused = 0
    for folder in proc.iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            found = list(_ledgers_in(folder / "maps"))
        except PermissionError:
            refused += 1
        except OSError:
            continue  # it has ended
        else:
            for identity, path in found:
                pids.setdefault(identity, set()).add(int(folder.name))
                paths[identity] = path
    ledgers = [
        MappedLedger(
            Path(path.removesuffix(_DELETED)).name,
            path.removesuffix(_DELETED),
            identity,
            path.endswith(_DELETED),
            tuple(sorted(pids[identity])),
        )
        for identity, path in paths.items()
    ]
    return sorted(ledgers, key=lambda each: (each.file_name, each.path)), refused


def _ledgers_in(maps: Path) -> Iterator[tuple[tuple[str, str], str]]:
    for found in _LINE.finditer(maps.read_bytes()):
        device, inode, path = (part.decode(errors="replace") for part in found.groups())
        yield (device, inode), path


def strangers(
    processes: Mapping[int, int], ledger: LedgerSnapshot | None, mapped: Iterable[MappedLedger] = ()
) -> dict[int, int]:
    """Of the processes that the driver sees on a GPU, those that the ledger does not know, and how
    many bytes each of them holds.

    A ledger holds process ids as its engines see them, which are others in a container. So who maps
    the very file that this process has open is no stranger either (``mapped``: ledgers of the GPU).
    """
    accounts = () if ledger is None else ledger.accounts
    known = {pid for account in accounts for pid in account.pids}
    known |= {pid for each in mapped if os.getpid() in each.pids for pid in each.pids}
    return {pid: used for pid, used in processes.items() if pid not in known}


def is_here(pid: int) -> bool:
    """Whether there is such a process in this PID namespace. The driver gives the host's ids: of
    those that it names, a container often has none.
    """
    return Path(f"/proc/{pid}").exists()
