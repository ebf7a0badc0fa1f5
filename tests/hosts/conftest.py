from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import two_hosts

TOY = Path(__file__).resolve().parents[1] / "serve" / "toy_engine.py"


@pytest.fixture(scope="session")
def toy_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python whose neighbour `vllm` is a toy."""
    folder = tmp_path_factory.mktemp("environment")
    (folder / "python").symlink_to(sys.executable)
    program = folder / "vllm"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {TOY} "$@"\n')
    program.chmod(0o755)
    return folder / "python"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[two_hosts.Cluster]:
    if not two_hosts.has_ray():
        pytest.skip("there is no Ray: make test-ray brings it")
    with two_hosts.cluster(tmp_path_factory.mktemp("hosts")) as found:
        yield found
