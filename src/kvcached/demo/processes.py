"""Which processes belong to an engine."""

from __future__ import annotations

import os


def session_processes(session: int) -> list[int]:
    """The live processes of a session (field 6 of /proc/PID/stat; zombies are left out)."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat", "rb") as stream:
                fields = stream.read().rpartition(b")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        if fields[0] != b"Z" and int(fields[3]) == session:
            found.append(int(entry))
    return found


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
