"""Which processes belong to an engine: those of the session that its first process leads. And what
a process has used, as the kernel counts it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def is_in_session(pid: int, session: int) -> bool:
    """Whether this live process is of the session (field 6 of /proc/PID/stat; no zombies)."""
    fields = _stat(pid)
    return fields is not None and fields[0] != b"Z" and int(fields[3]) == session


def session_processes(session: int) -> list[int]:
    """The live processes of a session."""
    return [pid for pid in _pids() if is_in_session(pid, session)]


def stopped_processes(session: int) -> list[int]:
    """Those of them that a signal has stopped, and that no signal has continued."""
    found = ((pid, _stat(pid)) for pid in session_processes(session))
    return [pid for pid, fields in found if fields is not None and fields[0] == b"T"]


def session_cpu_s(session: int) -> float:
    """Processor seconds that the live processes of a session have used so far."""
    return sum(cpu_s(pid) for pid in session_processes(session))


def cpu_s(pid: int) -> float:
    """Processor seconds that a process has used so far; 0 if it has ended."""
    fields = _stat(pid)
    return 0.0 if fields is None else (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def resident_bytes(pid: int) -> int:
    """Memory of a live process that is present now, shared or not. Raises OSError if it is gone."""
    with open(f"/proc/{pid}/statm") as stream:
        return int(stream.read().split()[1]) * _PAGE_BYTES


def _pids() -> Iterator[int]:
    return (int(entry) for entry in os.listdir("/proc") if entry.isdigit())


def _stat(pid: int) -> list[bytes] | None:
    """The fields of /proc/PID/stat from the state on; None if the process ended meanwhile."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stream:
            return stream.read().rpartition(b")")[2].split()
    except OSError:
        return None
