"""Environments in which engines are toy_engine.py, and what their processes are known by."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

TOY = Path(__file__).resolve().parent / "toy_engine.py"


def make_toy_python(folder: Path) -> Path:
    """A Python whose neighbour `vllm` is the toy."""
    (folder / "python").symlink_to(sys.executable)
    program = folder / "vllm"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {TOY} "$@"\n')
    program.chmod(0o755)
    return folder / "python"


def mentioning(text: str) -> list[int]:
    """Processes whose environment holds a text."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and text.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found
