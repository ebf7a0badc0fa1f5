"""Which processes belong to an engine: those of the session that its first process leads."""

from __future__ import annotations

import os
from collections.abc import Iterator


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
    found = (_stat(pid) for pid in session_processes(session))
    ticks = sum(int(fields[11]) + int(fields[12]) for fields in found if fields is not None)
    return ticks / os.sysconf("SC_CLK_TCK")


def _pids() -> Iterator[int]:
    return (int(entry) for entry in os.listdir("/proc") if entry.isdigit())


def _stat(pid: int) -> list[bytes] | None:
    """The fields of /proc/PID/stat from the state on; None if the process ended meanwhile."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stream:
            return stream.read().rpartition(b")")[2].split()
    except OSError:
        return None
