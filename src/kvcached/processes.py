"""Which processes belong to an engine."""

from __future__ import annotations

import os


def is_in_session(pid: int, session: int) -> bool:
    """Whether this live process is of the session (field 6 of /proc/PID/stat; no zombies)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stream:
            fields = stream.read().rpartition(b")")[2].split()
    except OSError:
        return False  # it ended meanwhile
    return fields[0] != b"Z" and int(fields[3]) == session


def session_processes(session: int) -> list[int]:
    """The live processes of a session."""
    pids = (int(entry) for entry in os.listdir("/proc") if entry.isdigit())
    return [pid for pid in pids if is_in_session(pid, session)]


def session_cpu_s(session: int) -> float:
    """Processor seconds that the live processes of a session have used so far."""
    ticks = 0
    for pid in session_processes(session):
        try:
            with open(f"/proc/{pid}/stat", "rb") as stream:
                fields = stream.read().rpartition(b")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
