from __future__ import annotations

from pathlib import Path

import pytest
from toys import TOY, make_toy_python


@pytest.fixture(scope="session")
def toy_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python whose neighbour `vllm` is toy_engine.py."""
    return make_toy_python(tmp_path_factory.mktemp("environment"))


@pytest.fixture(scope="session")
def toy_sglang(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH in which `sglang.launch_server` is toy_engine.py."""
    folder = tmp_path_factory.mktemp("path")
    (folder / "sglang").mkdir()
    (folder / "sglang" / "__init__.py").touch()
    program = f"import runpy\nrunpy.run_path({str(TOY)!r}, run_name='__main__')\n"
    (folder / "sglang" / "launch_server.py").write_text(program)
    return folder
