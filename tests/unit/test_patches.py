"""The patches apply to the files of the very packages that they name."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from kvcached.engines.sglang import finder

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "engine_integration" / "scripts"
WHEELS = ROOT / "build" / "wheels"
PATCHES = sorted(SCRIPTS.glob("kvcached-*-v*.patch"))


def wheel(project: str, version: str) -> Path:
    """The published wheel, fetched once."""
    pattern = f"{project}-{version}-*.whl"
    if not list(WHEELS.glob(pattern)):
        WHEELS.mkdir(parents=True, exist_ok=True)
        fetch = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(WHEELS)]
        subprocess.run([*fetch, f"{project}=={version}"], check=True, capture_output=True)
    return next(iter(WHEELS.glob(pattern)))


def unpack(patch: Path, folder: Path) -> list[Path]:
    """The files that a patch changes, as published."""
    found = re.fullmatch(r"kvcached-(\w+)-v(.+)\.patch", patch.name)
    assert found
    names = re.findall(r"^--- a/(\S+)", patch.read_text(), re.MULTILINE)
    assert names
    with zipfile.ZipFile(wheel(found[1], found[2])) as archive:
        return [Path(archive.extract(name, folder)) for name in names]


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
@pytest.mark.parametrize("tool", [("patch", "-p1", "-i"), ("git", "apply", "-p1")], ids=" ".join)
def test_a_patch_applies_to_the_published_files_and_comes_off(
    patch: Path, tool: tuple[str, ...], tmp_path: Path
) -> None:
    files = unpack(patch, tmp_path)
    before = [file.read_bytes() for file in files]
    done = subprocess.run([*tool, str(patch)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search(r"fuzz|offset", done.stdout), done.stdout
    for file, text in zip(files, before, strict=True):
        assert file.read_bytes() != text
        compile(file.read_text(), str(file), "exec")
    subprocess.run(["patch", "-R", "-p1", "-i", str(patch)], cwd=tmp_path, check=True)
    assert [file.read_bytes() for file in files] == before


def added(engine: str) -> list[str]:
    """The lines that an engine's patch adds."""
    (patch,) = (each for each in PATCHES if each.name.startswith(f"kvcached-{engine}-"))
    lines = patch.read_text().splitlines()
    return [line[1:].strip() for line in lines if line[:1] == "+" and line[:3] != "+++"]


def test_the_patch_of_vllm_calls_every_hook_and_nothing_else() -> None:
    called = {name for line in added("vllm") for name in re.findall(r"hooks\.(\w+)\(", line)}
    assert called == {"configured", "processed", "built", "runs", "ended"}
    assert len([line for line in added("vllm") if line]) <= 12


def test_the_patch_of_sglang_calls_what_the_finder_calls_in_the_same_modules() -> None:
    (patch,) = (each for each in PATCHES if each.name.startswith("kvcached-sglang-"))
    files = re.findall(r"^--- a/(\S+)\.py", patch.read_text(), re.MULTILINE)
    assert {file.replace("/", ".") for file in files} == {*finder.WAITED_FOR}
    assert len([line for line in added("sglang") if line]) == 2 * len(finder.WAITED_FOR)
    assert added("sglang").count("kvcached_plugin.take_hold((__name__,))") == len(files)
