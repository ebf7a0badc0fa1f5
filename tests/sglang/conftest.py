"""Real SGLang engines and classes: one tiny model and one plain answer for all of them.

Run in an environment of ``tools/setup_sglang.py``; elsewhere there is nothing to collect.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

pytest.register_assert_rewrite("one_engine", "two_devices")

from sgl_harness import ENVIRONMENT, Engine  # noqa: E402
from sgl_models import answered_by_transformers, made  # noqa: E402

HAS_SGLANG = importlib.util.find_spec("sglang") is not None
collect_ignore_glob = [] if HAS_SGLANG else ["test_*.py"]
if HAS_SGLANG:
    os.environ.update(ENVIRONMENT)  # for tests that use SGLang's classes in this process


@pytest.fixture(autouse=True)
def what_runs(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> None:
    """For the support matrix (``tools/matrix.py``): whether a real engine runs a real model."""
    runs_a_model = "model" in request.fixturenames
    record_property("runs", "real engine" if runs_a_model else "real classes")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("tiny"), "llama")


@pytest.fixture(scope="session")
def reference(model: Path) -> list[list[int]]:
    """What transformers answers in float32."""
    return answered_by_transformers(model)


@pytest.fixture(scope="session")
def plain(
    model: Path, reference: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> list[list[int]]:
    """What SGLang without kvcached answers: the same."""
    job = {"task": "equality", "model": str(model), "arguments": {}, "rounds": 1}
    with Engine(tmp_path_factory.mktemp("plain"), job, {}) as engine:
        outputs: list[list[int]] = engine.answer()["outputs"][0]
    assert outputs == reference
    return outputs
