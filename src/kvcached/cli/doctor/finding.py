"""What the doctor finds."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Level(str, Enum):
    """How bad it is. Only errors make the command fail, and warnings where that is asked for."""

    ok = "ok"
    note = "note"
    warning = "warning"
    error = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    check: str
    """What was looked at, such as ``core`` or ``engine vllm``: for programs, does not change."""
    level: Level
    text: str
    """What was found, in one line."""
    do: str = ""
    """What to do about it, in one line; empty where nothing needs doing."""


def ok(check: str, text: str) -> Finding:
    """All is well."""
    return Finding(check, Level.ok, text)


def note(check: str, text: str, do: str = "") -> Finding:
    """Nothing is wrong, but it is good to know."""
    return Finding(check, Level.note, text, do)


def warning(check: str, text: str, do: str) -> Finding:
    """It works, but not as it could, or not for long."""
    return Finding(check, Level.warning, text, do)


def error(check: str, text: str, do: str) -> Finding:
    """kvcached does not work here, or not as if all were well."""
    return Finding(check, Level.error, text, do)
