"""Samples the physical bytes behind the engines' memfds, as the kernel counts them.

Runs as a process of its own (``python -m kvcached.demo.sampler``), so that neither the load
generator's work nor its interpreter lock delays a sample. It stats /proc/PID/fd/N and never opens
one: an open descriptor would keep memory alive after its owner has died.

A sample is a record: the monotonic time, then the bytes of every session in the order of the
command line. The newest one lies in a small shared mapping; all of them are written to the output
file when stdin closes, because a write to a busy disk would hold up the sampling.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from kvcached.errors import KvcachedError
from kvcached.processes import is_in_session, session_processes

INTERVAL_S = 0.003
SLICE_ENTRIES = 8
STOP_LIMIT_S = 5.0
MEMFD_PREFIX = "/memfd:kvcached:"


class SamplerError(KvcachedError):
    """Memory was not watched to the end, so nothing can be said about the budget."""


class _ProcessWatch:
    """The memfds of one process. A known descriptor is checked by inode, as numbers are reused."""

    def __init__(self, pid: int) -> None:
        self.folder = f"/proc/{pid}/fd"
        self.holds_memory = False
        self.fresh = True  # not read yet
        self._known: dict[str, tuple[int, bool]] = {}  # descriptor -> inode, whether it is ours

    def add_to(self, blocks: dict[int, int]) -> None:
        """Adds bytes by inode. Raises OSError when the process is gone."""
        self.fresh = False
        for number in os.listdir(self.folder):
            known = self._known.get(number)
            if known is not None and not known[1]:
                # Other files: looked at again only when the number is handed out anew, which the
                # periodic ``forget`` covers.
                continue
            path = f"{self.folder}/{number}"
            try:
                status = os.stat(path)
                if known is None or known[0] != status.st_ino:
                    ours = os.readlink(path).startswith(MEMFD_PREFIX)
                    self._known[number] = known = (status.st_ino, ours)
            except FileNotFoundError:
                continue  # closed since it was listed
            if known[1]:
                self.holds_memory = True
                blocks[status.st_ino] = status.st_blocks * 512

    def forget(self) -> None:
        """Looks again at every descriptor that was not ours."""
        self._known = {number: known for number, known in self._known.items() if known[1]}


class SessionWatch:
    """The memfds of all processes of one engine; a memfd that two of them hold counts once.

    Processes that have held one are read at each sample. Looking for new processes, and at those
    that have never held one, takes longer than a sample may: it is done in slices.
    """

    def __init__(self, session: int) -> None:
        self._session = session
        self._processes: dict[int, _ProcessWatch] = {}
        self._due: _ProcessWatch | None = None
        for pid in session_processes(session):
            self._processes[pid] = _ProcessWatch(pid)
        self._chores = self._look_around()

    def physical_bytes(self) -> int:
        next(self._chores)
        blocks: dict[int, int] = {}
        for pid, watch in list(self._processes.items()):
            if not (watch.holds_memory or watch.fresh or watch is self._due):
                continue
            try:
                watch.add_to(blocks)
            except OSError:
                del self._processes[pid]
        return sum(blocks.values())

    def _look_around(self) -> Iterator[None]:
        """Never ends; each slice takes a fraction of a millisecond."""
        while True:
            for count, entry in enumerate(os.listdir("/proc")):
                if count % SLICE_ENTRIES == 0:
                    yield
                pid = int(entry) if entry.isdigit() else 0
                if pid and pid not in self._processes and is_in_session(pid, self._session):
                    self._processes[pid] = _ProcessWatch(pid)
            for watch in list(self._processes.values()):
                watch.forget()
                self._due = watch
                yield
            self._due = None


@dataclass(frozen=True, slots=True)
class Sample:
    """Physical bytes of each engine at one moment of the monotonic clock."""

    at_s: float
    engine_bytes: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.engine_bytes)


class Sampler:
    """The sampling process, seen from the demo. Use as a context manager."""

    def __init__(self, sessions: Sequence[int], output: Path) -> None:
        self._record = _record(len(sessions))
        self._output = output
        output.parent.mkdir(parents=True, exist_ok=True)
        output.unlink(missing_ok=True)
        shared = os.memfd_create("demo-latest-sample")
        try:
            os.ftruncate(shared, self._record.size)
            self._latest = mmap.mmap(shared, self._record.size, prot=mmap.PROT_READ)
            command = [sys.executable, "-m", "kvcached.demo.sampler", str(output), str(shared)]
            self._process = subprocess.Popen(
                command + [str(session) for session in sessions],
                stdin=subprocess.PIPE,
                pass_fds=[shared],
            )
        finally:
            os.close(shared)

    def latest(self) -> Sample | None:
        """The newest sample; None before the first."""
        sample = self._unpack(self._latest[:])
        return sample if sample.at_s else None

    def stop(self) -> list[Sample]:
        """Ends the process and returns all samples. Raises SamplerError when it had died."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.returncode != 0:
            raise SamplerError(f"the memory sampler ended with {self._process.returncode}")
        data = self._output.read_bytes()
        size = self._record.size
        return [self._unpack(data[at : at + size]) for at in range(0, len(data), size)]

    def _unpack(self, data: bytes) -> Sample:
        at_s, *engine_bytes = self._record.unpack(data)
        return Sample(at_s, tuple(engine_bytes))

    def __enter__(self) -> Sampler:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def _record(sessions: int) -> struct.Struct:
    return struct.Struct(f"<d{sessions}q")


def _ask_for_priority() -> None:
    """A real-time or at least a higher priority where it may be had; late samples are reported."""
    with contextlib.suppress(OSError):
        os.nice(-10)
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


def main(arguments: Sequence[str]) -> None:
    """``OUTPUT SHARED_FD SESSION...``: samples until stdin closes."""
    output, shared, sessions = arguments[0], int(arguments[1]), arguments[2:]
    _ask_for_priority()
    record = _record(len(sessions))
    latest = mmap.mmap(shared, record.size)
    watches = [SessionWatch(int(session)) for session in sessions]
    samples = bytearray()
    due_s = time.monotonic()
    while True:
        now_s = time.monotonic()
        data = record.pack(now_s, *(watch.physical_bytes() for watch in watches))
        samples += data
        latest[:] = data
        due_s = max(due_s + INTERVAL_S, now_s)
        pause_s = max(0.0, due_s - time.monotonic())
        if select.select([sys.stdin], [], [], pause_s)[0]:
            break
    Path(output).write_bytes(samples)


if __name__ == "__main__":
    main(sys.argv[1:])
