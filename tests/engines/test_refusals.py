"""kvcached on, and it cannot take hold: the server does not start, and says what to do."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import HERE, MIB, SOURCE, end_session, environment, switched_on

SUPPORTED = "==0.8.4, ~=0.13.0, ==0.19.1, ~=0.24.0, ~=0.26.0, ~=0.32.0"
OTHER_VERSION = """
import sys, types
version = types.ModuleType("vllm._version")
version.__version__, version.__version_tuple__ = "0.99.0", (0, 99, 0)
sys.modules["vllm._version"] = version
"""


def unsupported_version(folder: Path) -> Path:
    (folder / "sitecustomize.py").write_text(OTHER_VERSION)
    return folder


def broken_core(folder: Path) -> Path:
    shutil.copytree(SOURCE / "kvcached", folder / "kvcached", dirs_exist_ok=True)
    for library in (folder / "kvcached").glob("vmm_ops*.so"):
        library.write_bytes(b"not a library")
    return folder


def missing_core(folder: Path) -> Path:
    shutil.copytree(SOURCE / "kvcached", folder / "kvcached", dirs_exist_ok=True)
    for library in (folder / "kvcached").glob("vmm_ops*.so"):
        library.unlink()
    return folder


def serve(model: Path, folder: Path, changes: dict[str, str], *paths: Path) -> tuple[int, str]:
    program = Path(sys.executable).with_name("vllm")
    log = folder / "serve.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [str(program), "serve", str(model), "--enforce-eager", "--max-model-len", "512"],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment(changes, *paths),
            start_new_session=True,
        )
    try:
        code = process.wait(150)
    finally:
        end_session(process)
    return code, log.read_text(errors="replace")


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (unsupported_version, ["vllm 0.99.0 is not supported", f"supported: {SUPPORTED}"]),
        (
            broken_core,
            ["vllm {version}", "core library", SUPPORTED, "python setup.py build_ext --inplace"],
        ),
    ],
)
def test_the_server_does_not_start(
    model: Path, tmp_path: Path, prepare: Callable[[Path], Path], says: list[str]
) -> None:
    (path := tmp_path / "path").mkdir()
    code, log = serve(model, tmp_path, switched_on(tmp_path, 32 * MIB), prepare(path))
    assert code != 0
    version = importlib.metadata.version("vllm").partition("+")[0]
    for part in [*(words.format(version=version) for words in says), "Unset ENABLE_KVCACHED"]:
        assert part in log, f"{part!r} is not in:\n{log[-4000:]}"
    assert not (tmp_path / "ledger").exists()


@pytest.mark.parametrize("prepare", [broken_core, missing_core])
def test_a_core_that_does_not_load_is_named(
    model: Path, tmp_path: Path, prepare: Callable[[Path], Path]
) -> None:
    """And switched off, such a kvcached disturbs nothing."""
    code = "from kvcached.engines.vllm.plugin import register; register()"
    changes = switched_on(tmp_path, 32 * MIB)
    env = environment(changes, prepare(tmp_path / "path"))
    on = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert on.returncode == 1
    last = on.stderr.strip().splitlines()[-1]
    assert last.startswith("kvcached.errors.EngineError: "), on.stderr
    assert "build_ext --inplace" in last and "Unset ENABLE_KVCACHED" in last
    env["ENABLE_KVCACHED"] = "false"
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


def test_seams_are_taken_all_or_none_and_only_when_switched_on(tmp_path: Path) -> None:
    """On vLLM's real classes, in a process of its own."""
    env = environment(switched_on(tmp_path, 32 * MIB))
    result = subprocess.run(
        [sys.executable, str(HERE / "seams_process.py")], env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-4000:]
