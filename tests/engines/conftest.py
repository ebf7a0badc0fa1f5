"""Real vLLM engines (marker ``engine``): one tiny model and one plain answer for all of them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import (
    HERE,
    MIB,
    Pair,
    environment,
    limited,
)
from plain import answers_of_plain_vllm
from versions import vllm_version

pytest.register_assert_rewrite("two_devices")

DEFAULT_LIMIT_S = 240.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == HERE:
            item.add_marker(pytest.mark.engine)


@pytest.fixture(autouse=True)
def kind(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    """For the support matrix (``tools/matrix.py``): whether a real engine runs, and what model."""
    kinds = {"model": "real engine", "toy_model": "toy model"}
    found = (kinds[name] for name in kinds if name in request.fixturenames)
    record_property("runs", next(found, "real classes"))


@pytest.fixture(autouse=True)
def in_time(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test here has a limit of its own (``limit_s`` on the function, or the default)."""
    with limited(getattr(request.function, "limit_s", DEFAULT_LIMIT_S)):
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    if vllm_version().startswith("0.8."):
        pytest.skip("this vLLM does not run on a CPU")
    folder = tmp_path_factory.mktemp("tiny")
    subprocess.run(
        [sys.executable, str(HERE / "tiny_model.py"), str(folder)],
        env=environment({}),
        check=True,
        capture_output=True,
    )
    return folder


@pytest.fixture(scope="session")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """What vLLM without kvcached answers."""
    return answers_of_plain_vllm(model, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def pair_of_servers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(model, tmp_path_factory.mktemp("pair"), capacity=12 * MIB)
    yield pair
    pair.close()


@pytest.fixture
def pair(pair_of_servers: Pair) -> Pair:
    """Two healthy servers under one budget; what a test before has killed is started again."""
    return pair_of_servers.up()
