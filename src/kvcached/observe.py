"""Looks at every ledger of a folder again and again: what tools do that watch.

Reading takes no lock and wakes nobody, so a watcher costs the engines nothing but cache lines. A
ledger that appears, goes, or is replaced by another file is followed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from kvcached import devices
from kvcached.closing import Closing
from kvcached.errors import LedgerError
from kvcached.ledger import Ledger
from kvcached.snapshot import LedgerSnapshot
from kvcached.vmm_ops import ledger_file_name


class Observer(Closing):
    """Reads the ledgers of one folder. One thread at a time; needs no permission to write."""

    def __init__(self, directory: Path, named: Sequence[str] = ()) -> None:
        """``named`` are the only devices of interest, as ``devices.find`` names them; all that are
        shared if there are none.
        """
        self.directory = directory
        self.problems: dict[str, str] = {}
        """Devices whose ledger could not be read the last time, or the folder, and why."""
        self._named = tuple(named)
        self._open: dict[str, tuple[tuple[int, int], Ledger]] = {}

    def read(self) -> list[LedgerSnapshot]:
        """Every ledger that can be read now, by device. See ``problems`` for the others."""
        self.problems = {}
        found = []
        names: Sequence[str] = self._named
        try:
            names = names or devices.shared(self.directory)
        except LedgerError as error:
            self.problems[str(self.directory)] = str(error)
        for gone in self._open.keys() - set(names):
            self._forget(gone)
        for name in names:
            try:
                found.append(self._ledger(name).snapshot())
            except LedgerError as error:
                self.problems[name] = str(error)
                self._forget(name)
        return found

    def _ledger(self, device: str) -> Ledger:
        identity = self._identity(device)
        opened = self._open.get(device)
        if opened is not None and opened[0] == identity:
            return opened[1]
        self._forget(device)
        ledger = Ledger.open(self.directory, device, create=False, read_only=True)
        self._open[device] = (identity, ledger)
        return ledger

    def _identity(self, device: str) -> tuple[int, int]:
        """Which file lies under the ledger's name now."""
        try:
            found = os.stat(self.directory / ledger_file_name(device))
        except OSError:
            return (0, 0)  # opening it says what is wrong
        return (found.st_dev, found.st_ino)

    def _forget(self, device: str) -> None:
        if device in self._open:
            self._open.pop(device)[1].close()

    def close(self) -> None:
        """Lets go of all ledgers."""
        for device in tuple(self._open):
            self._forget(device)
