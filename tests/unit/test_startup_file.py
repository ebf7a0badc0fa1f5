"""The start-up file that comes with kvcached: it must cost nothing and change nothing elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src"
STARTUP = SOURCE / "kvcached.pth"

PROGRAM = """
import json, sys
before = set(sys.modules), [type(each).__name__ for each in sys.meta_path]
exec(open(sys.argv[1]).read())
after = set(sys.modules), [type(each).__name__ for each in sys.meta_path]
ours = sorted(name for name in after[0] if name.startswith("kvcached"))
heavy = sorted((after[0] - before[0]) & {"torch", "numpy", "packaging", "re", "logging"})
print(json.dumps([ours, heavy, after[1][: len(after[1]) - len(before[1])]]))
"""


def run(**environment: str) -> list[list[str]]:
    done = subprocess.run(
        [sys.executable, "-S", "-c", PROGRAM, str(STARTUP)],
        env={"PYTHONPATH": str(SOURCE), **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    answer: list[list[str]] = json.loads(done.stdout)
    return answer


def test_off_it_imports_nothing() -> None:
    assert run() == run(ENABLE_KVCACHED="") == [[], [], []]


def test_on_it_leaves_one_finder_and_imports_only_that() -> None:
    ours, heavy, finders = run(ENABLE_KVCACHED="true")
    assert finders == ["SglangFinder"]
    assert not heavy
    assert ours == [
        "kvcached",
        "kvcached.engines",
        "kvcached.engines.sglang",
        "kvcached.engines.sglang.finder",
    ]


def test_the_finder_finds_only_what_it_waits_for(tmp_path: Path) -> None:
    """A package that happens to be called sglang, with a scheduler and another module."""
    for name in ("sglang", "sglang/srt", "sglang/srt/managers"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "sglang/srt/managers/other.py").write_text("kind = 'other'")
    (tmp_path / "sglang/srt/managers/scheduler.py").write_text("kind = 'scheduler'")
    program = """
import sys
exec(open(sys.argv[1]).read())
import sglang.srt.managers.other as other
print(other.kind, type(other.__spec__.loader).__name__)
import sglang.srt.managers.scheduler
"""

    def start(**environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program, str(STARTUP)],
            env={"PYTHONPATH": f"{tmp_path}:{SOURCE}", **environment},
            capture_output=True,
            text=True,
        )

    off = start(ENABLE_KVCACHED="false")
    assert (off.returncode, off.stdout) == (0, "other SourceFileLoader\n")
    on = start(ENABLE_KVCACHED="true")
    assert (on.returncode, on.stdout) == (1, "other SourceFileLoader\n")
    assert "sglang" in on.stderr and "Unset ENABLE_KVCACHED" in on.stderr


def test_a_second_call_leaves_one_finder() -> None:
    pytest.importorskip("kvcached.engines.sglang.finder")
    from kvcached.engines.sglang import finder

    before = list(sys.meta_path)
    try:
        finder.wait()
        finder.wait()
        ours = [each for each in sys.meta_path if isinstance(each, finder.SglangFinder)]
        assert len(ours) == 1
    finally:
        sys.meta_path[:] = before
