"""C++ programs on the core, without Python (``tools/native.py``)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
Build = Callable[[str, str], Path]


@pytest.fixture(scope="session")
def tools() -> Callable[[str], ModuleType]:
    """Imports one of the project's tools."""
    sys.path.insert(0, str(TOOLS))
    try:
        importlib.import_module("native")
    finally:
        sys.path.remove(str(TOOLS))

    def load(name: str) -> ModuleType:
        sys.path.insert(0, str(TOOLS))
        try:
            return importlib.import_module(name)
        finally:
            sys.path.remove(str(TOOLS))

    return load


@pytest.fixture(scope="session")
def build(tools: Callable[[str], ModuleType]) -> Build:
    """Builds a program of a flavour; skips where this machine's compiler cannot."""
    native = tools("native")

    def make(flavour: str, program: str) -> Path:
        try:
            path: Path = native.build(flavour, program)
        except native.Unavailable as reason:
            pytest.skip(str(reason))
        return path

    return make
