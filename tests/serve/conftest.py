from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def toy_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python whose neighbour `vllm` is toy_engine.py."""
    folder = tmp_path_factory.mktemp("environment")
    (folder / "python").symlink_to(sys.executable)
    program = folder / "vllm"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {HERE / "toy_engine.py"} "$@"\n')
    program.chmod(0o755)
    return folder / "python"
