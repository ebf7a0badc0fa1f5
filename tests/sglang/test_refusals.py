"""Where kvcached cannot take hold, SGLang does not start as if it had."""

from __future__ import annotations

from pathlib import Path

import pytest
from sgl_harness import MIB, Engine, switched_on, wait_until

from kvcached.engines import registry
from kvcached.engines.sglang import adapter

pytestmark = pytest.mark.engine

# A start-up file of Python's that changes SGLang before kvcached sees it.
RENAME = """
import warnings
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from sglang.srt.managers.schedule_batch import ScheduleBatch
ScheduleBatch.take_back = ScheduleBatch.retract_decode
del ScheduleBatch.retract_decode
"""
OTHER_VERSION = """
import importlib.metadata
original = importlib.metadata.version
importlib.metadata.version = lambda name: "0.7.1" if name == "sglang" else original(name)
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (RENAME, "ScheduleBatch.retract_decode is not there in this version of the engine"),
        (OTHER_VERSION, "sglang 0.7.1 is not supported; supported: "),
    ],
    ids=["changed-seam", "unknown-version"],
)
def test_what_it_does_not_know_ends_it(
    model: Path, tmp_path: Path, change: str, message: str
) -> None:
    folder = tmp_path / "changed"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(change)
    job = {"task": "equality", "model": str(model), "arguments": {}}
    with Engine(tmp_path / "engine", job, switched_on(tmp_path, 8 * MIB), folder) as engine:
        assert engine.ended() != 0
        assert message in engine.text() and registry.OFF in engine.text()
        assert not engine.answer_file.exists()


def test_what_is_not_supported_is_named(model: Path, tmp_path: Path) -> None:
    job = {"task": "equality", "model": str(model), "arguments": {"enable_mixed_chunk": True}}
    with Engine(tmp_path / "engine", job, switched_on(tmp_path, 8 * MIB)) as engine:
        words = "does not support mixed chunks of prefill and decode of SGLang yet"
        wait_until(lambda: words in engine.text(), 90, "the message")
        assert not engine.answer_file.exists()


def test_this_version_is_supported() -> None:
    assert adapter.name().startswith("kvcached.engines.sglang.v")
