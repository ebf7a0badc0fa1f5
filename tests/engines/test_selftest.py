"""An engine with a changed seam does not start: copies of the real one, each with one change."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness import HERE, MIB, environment, switched_on
from test_refusals import serve
from versions import vllm_version

pytestmark = pytest.mark.skipif(not vllm_version(), reason="vLLM is not installed")

OLD = vllm_version().startswith("0.8.")
WORKER = "toy_engine_0_8.ToyWorker" if OLD else "vllm.v1.worker.cpu_worker.CPUWorker"
PROCESSOR = "processor" if OLD else "input_processor"
# file below vllm/v1, pattern, what replaces it, which part looks, what it says
CHANGES = {
    "renamed method of the front end": (
        f"engine/{PROCESSOR}.py",
        r"def process_inputs\(",
        "def process_prompt(",
        "front",
        "process_inputs is not there",
    ),
    "new parameter in the front end": (
        f"engine/{PROCESSOR}.py",
        r"def process_inputs\(\s*self,",
        "def process_inputs(self, request_kind,",
        "front",
        "process_inputs takes (self, request_kind, request_id, prompt",
    ),
    "renamed method of the engine": (
        "engine/core.py",
        r"\brun_busy_loop\b",
        "run_loop",
        "front",
        "vllm.v1.engine.core:EngineCoreProc.run_busy_loop is not there",
    ),
    "renamed method of the pool": (
        "core/block_pool.py",
        r"\b_maybe_evict_cached_block\b",
        "_evict_if_cached",
        "scheduler",
        "vllm.v1.core.block_pool:BlockPool._maybe_evict_cached_block is not there",
    ),
    "new parameter of the pool": (
        "core/block_pool.py",
        r"def get_new_blocks\(self, num_blocks: int",
        "def get_new_blocks(self, num_blocks: int, group: int = 0",
        "scheduler",
        "get_new_blocks takes (self, num_blocks, group=), and kvcached counts on "
        "(self, num_blocks)",
    ),
    "renamed method of the scheduler": (
        "core/sched/scheduler.py",
        r"\bupdate_from_output\b",
        "take_output",
        "scheduler",
        "vllm.v1.core.sched.scheduler:Scheduler.update_from_output is not there",
    ),
    "new parameter of the worker": (
        "worker/cpu_worker.py",
        r"def determine_available_memory\(self",
        "def determine_available_memory(self, share=1.0",
        "worker",
        "vllm.v1.worker.cpu_worker:CPUWorker.determine_available_memory takes (self, share=)",
    ),
}
# In the order of a real engine: what it imports, then each of its parts' classes.
LOOK = """
import sys, time
start = time.perf_counter
from vllm.v1.engine.core import EngineCore
from kvcached.engines.vllm import adapter, classes, install
from kvcached.config import Config
import vllm.v1.core.sched.scheduler, vllm.v1.core.kv_cache_manager
a = start()
install.install(Config.from_env())
b = start()
for kind, base in [pair.split("=") for pair in sys.argv[1:]]:
    getattr(classes, classes.qualified_name(kind, base).rpartition(".")[2])
from kvcached.engines.vllm import selftest
c = start()
selftest.check_front(adapter.current().expects)
d = start()
selftest.check_base("scheduler", vllm.v1.core.sched.scheduler.Scheduler)
e = start()
print("front_ms", (d - c) * 1e3, "scheduler_ms", (e - d) * 1e3)
"""


def changed_copy(folder: Path, file: str, pattern: str, new: str) -> Path:
    """All of vLLM but one file as links, and that file with a change."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    package = Path(spec.origin).parent
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package, folder / "vllm", copy_function=os.symlink, ignore=ignore)
    changed = folder / "vllm" / "v1" / file
    text, count = re.subn(pattern, new, changed.read_text())
    assert count > 0, f"{file} has no {pattern}"
    changed.unlink()
    changed.write_text(text)
    return folder


def classes_of(part: str) -> list[str]:
    names = {
        "front": [],
        "scheduler": [
            "scheduler=vllm.v1.core.sched.scheduler.Scheduler",
            "scheduler=vllm.v1.core.sched.async_scheduler.AsyncScheduler",
        ],
        "worker": [f"worker={WORKER}"],
    }
    return names[part]


def look(folder: Path, part: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LOOK, *classes_of(part)],
        env=environment(switched_on(folder, 32 * MIB), *paths, HERE),
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_seam_is_refused_by_name(tmp_path: Path, name: str) -> None:
    file, pattern, new, part, says = CHANGES[name]
    if OLD and part == "worker":
        pytest.skip("vLLM 0.8's worker cannot be imported without a GPU")
    found = look(tmp_path, part, changed_copy(tmp_path / "copy", file, pattern, new))
    assert found.returncode == 1, found.stdout + found.stderr
    last = found.stderr.strip().splitlines()[-1]
    assert last.startswith("kvcached.errors.EngineError: kvcached does not fit this vLLM"), last
    version = vllm_version().partition("+")[0]
    for words in (says, f"vLLM {version}", "install one of these", "Unset ENABLE_KVCACHED"):
        assert words in last, last


def test_the_published_engine_fits_and_looking_takes_milliseconds(tmp_path: Path) -> None:
    for part in ("scheduler", "worker"):
        found = look(tmp_path, part)
        assert found.returncode == 0, found.stderr[-3000:]
    print(found.stdout)
    words = found.stdout.split()
    spent = [float(words[words.index(name) + 1]) for name in ("front_ms", "scheduler_ms")]
    assert sum(spent) < 100, "milliseconds, on a machine that does other things"


def test_a_server_with_a_changed_seam_does_not_start(model: Path, tmp_path: Path) -> None:
    """Deep inside: the seam is in the engine's process, which a server starts."""
    file, pattern, new, _, says = CHANGES["new parameter of the pool"]
    copy = changed_copy(tmp_path / "copy", file, pattern, new)
    code, log = serve(model, tmp_path, switched_on(tmp_path, 32 * MIB), copy)
    assert code != 0
    for words in ("kvcached does not fit this vLLM", says, "Unset ENABLE_KVCACHED"):
        assert words in log, log[-4000:]
