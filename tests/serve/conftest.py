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


@pytest.fixture(scope="session")
def toy_sglang(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH in which `sglang.launch_server` is toy_engine.py."""
    folder = tmp_path_factory.mktemp("path")
    (folder / "sglang").mkdir()
    (folder / "sglang" / "__init__.py").touch()
    program = (
        f"import runpy\nrunpy.run_path({str(HERE / 'toy_engine.py')!r}, run_name='__main__')\n"
    )
    (folder / "sglang" / "launch_server.py").write_text(program)
    return folder
