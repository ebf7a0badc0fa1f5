"""Models that have a GPU one at a time: whose turn it is, among processes, in one small file.

The one whose turn it is keeps it while nobody else has work. It hands over to whoever has waited
longest when it has none itself, or once it has had ``PATIENCE_S`` and somebody has waited as long:
then it sends no further request and ends those that run, since sleeping engines keep no KV cache.
The rules are those of ``kvcached.bench.sim_swap``.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

from kvcached.bench.sim_swap import PATIENCE_S

NOBODY = -1.0
_SLOT = struct.Struct("d")


class Turns:
    """One model's end of the file: the first slot says whose turn it is, then one for each model
    says since when it has waited on the system's monotonic clock, or 0. ``wake`` and ``sleep`` are
    the engine's; it sleeps when this is made.
    """

    def __init__(
        self,
        path: Path,
        index: int,
        models: int,
        wake: Callable[[], None],
        sleep: Callable[[], None],
    ) -> None:
        self.index = index
        self._models = models
        self._wake, self._sleep = wake, sleep
        self._awake = False
        self._awake_s = 0.0
        self.wakes: list[float] = []
        """How long each waking took, in seconds."""
        size = _SLOT.size * (1 + models)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        if os.fstat(self._file).st_size < size:
            os.pwrite(self._file, _SLOT.pack(NOBODY) + bytes(size - _SLOT.size), 0)
        fcntl.flock(self._file, fcntl.LOCK_UN)
        self._slots = mmap.mmap(self._file, size)

    def mine(self, since_s: float) -> bool:
        """Whether it is this model's turn, who has had work since then. Wakes it, if so."""
        if self._owner() != self.index:
            self._set(1 + self.index, since_s)
            if self._owner() == NOBODY:
                self._claim()
            if self._owner() != self.index:
                return False
        if not self._awake:
            self._set(1 + self.index, 0.0)
            begun = time.monotonic()
            self._wake()
            self._awake, self._awake_s = True, time.monotonic()
            self.wakes.append(self._awake_s - begun)
        return True

    def may_go_on(self, due_s: float | None, runs: bool) -> bool:
        """Whether the engine may go on: with what runs, or with requests that have been due since
        ``due_s``. Otherwise it has handed over, if need be, and a moment has passed.
        """
        due = due_s is not None and due_s <= time.monotonic()
        if runs or (due and self.mine(due_s or 0.0) and not self.hurries()):
            return True
        if due or self._waits():
            self.pass_on()
        time.sleep(0.002)
        return False

    def hurries(self) -> bool:
        """Whether this one, whose turn it is, should send nothing more."""
        now = time.monotonic()
        waits = self._waits()
        return now - self._awake_s > PATIENCE_S and any(now - s > PATIENCE_S for s in waits)

    def pass_on(self) -> None:
        """Sleeps, and hands the turn to who has waited longest, or to nobody."""
        if self._owner() != self.index:
            return
        if self._awake:
            self._sleep()
            self._awake = False
        waits = {self._get(1 + i): i for i in range(self._models) if i != self.index}
        waits.pop(0.0, None)
        self._set(0, float(waits[min(waits)]) if waits else NOBODY)

    def leave(self) -> None:
        """Has no more work: waits no longer, and passes on."""
        self._set(1 + self.index, 0.0)
        self.pass_on()

    def _claim(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_EX)
        if self._owner() == NOBODY:
            self._set(0, float(self.index))
        fcntl.flock(self._file, fcntl.LOCK_UN)

    def _waits(self) -> list[float]:
        found = [self._get(1 + i) for i in range(self._models) if i != self.index]
        return [since_s for since_s in found if since_s]

    def _owner(self) -> float:
        return self._get(0)

    def _get(self, slot: int) -> float:
        (value,) = _SLOT.unpack_from(self._slots, slot * _SLOT.size)
        return float(value)

    def _set(self, slot: int, value: float) -> None:
        _SLOT.pack_into(self._slots, slot * _SLOT.size, value)
