"""Where kvcached cannot take hold, SGLang does not start as if it had."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sgl_harness import ENVIRONMENT, MIB, SOURCE, Engine, switched_on, wait_until

from kvcached.config import child_environment
from kvcached.engines import registry
from kvcached.engines.sglang import adapter, finder

pytestmark = pytest.mark.engine

# A start-up file of Python's that changes SGLang before kvcached sees it.
OTHER_VERSION = """
import importlib.metadata
original = importlib.metadata.version
importlib.metadata.version = lambda name: "0.7.1" if name == "sglang" else original(name)
"""
# files below sglang/srt (one of them is there), pattern, what replaces it, what is said
CHANGES = {
    "renamed method": (
        ("managers/schedule_batch.py",),
        r"def retract_decode\(",
        "def take_back(",
        "schedule_batch:ScheduleBatch.retract_decode is not there",
    ),
    "new parameter": (
        ("managers/schedule_policy.py",),
        r"def add_one_req\(\s*self, req: Req,",
        "def add_one_req(self, req: Req, kind: int,",
        "PrefillAdder.add_one_req takes (self, req, kind, has_chunked_req",
    ),
    "renamed method of an allocator": (
        ("mem_cache/paged_allocator.py", "mem_cache/allocator.py", "mem_cache/allocator/paged.py"),
        r"def alloc_decode\(",
        "def alloc_next(",
        "PagedTokenToKVPoolAllocator.alloc_decode is not there",
    ),
}


def changed_copy(folder: Path, name: str) -> Path:
    """All of SGLang but one file as links, and that file with a change."""
    files, pattern, new, _ = CHANGES[name]
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.origin is not None
    shutil.copytree(Path(spec.origin).parent, folder / "sglang", copy_function=os.symlink)
    places = [folder / "sglang" / "srt" / file for file in files]
    (changed,) = [place for place in places if place.exists()]
    text, count = re.subn(pattern, new, changed.read_text())
    assert count > 0, f"{changed} has no {pattern}"
    changed.unlink()
    changed.write_text(text)
    return folder


def check_message(text: str, name: str) -> None:
    version = adapter.running_version()
    refusal = f"kvcached does not fit this SGLang {version}: "
    for words in (refusal, CHANGES[name][-1], "install one of these", registry.OFF):
        assert words in text, text[-4000:]


@pytest.mark.matrix
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_seam_is_refused_by_name(tmp_path: Path, name: str) -> None:
    paths = [str(changed_copy(tmp_path / "copy", name)), str(SOURCE)]
    changes = {**switched_on(tmp_path, 8 * MIB), "PYTHONPATH": os.pathsep.join(paths)}
    found = subprocess.run(
        [sys.executable, "-c", f"import {finder.SCHEDULER}"],
        env=child_environment({**ENVIRONMENT, **changes}),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 1, found.stdout + found.stderr
    check_message(found.stderr, name)


def test_an_engine_with_a_changed_seam_does_not_start(model: Path, tmp_path: Path) -> None:
    name = "renamed method"
    copy = changed_copy(tmp_path / "copy", name)
    job = {"task": "equality", "model": str(model), "arguments": {}}
    with Engine(tmp_path / "engine", job, switched_on(tmp_path, 8 * MIB), copy) as engine:
        assert engine.ended() != 0
        check_message(engine.text(), name)
        assert not engine.answer_file.exists()


def test_an_unknown_version_does_not_start(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(OTHER_VERSION)
    job = {"task": "equality", "model": str(model), "arguments": {}}
    with Engine(tmp_path / "engine", job, switched_on(tmp_path, 8 * MIB), folder) as engine:
        assert engine.ended() != 0
        message = "sglang 0.7.1 is not supported; supported: "
        assert message in engine.text() and registry.OFF in engine.text()
        assert not engine.answer_file.exists()


def test_what_is_not_supported_is_named(model: Path, tmp_path: Path) -> None:
    job = {"task": "equality", "model": str(model), "arguments": {"enable_mixed_chunk": True}}
    with Engine(tmp_path / "engine", job, switched_on(tmp_path, 8 * MIB)) as engine:
        words = "does not support mixed chunks of prefill and decode of SGLang yet"
        wait_until(lambda: words in engine.text(), 200, "the message")
        assert not engine.answer_file.exists()


def test_this_version_is_supported() -> None:
    assert adapter.name().startswith("kvcached.engines.sglang.v")
