#!/usr/bin/env python3
"""Builds .venv-sglang-VERSION/ in this checkout: SGLang on the CPU, torch, kvcached and its tests.

Standard library only. What SGLang itself asks for includes gigabytes of CUDA packages; here it gets
what it imports on a CPU (tools/sglang/) and stand-ins for the rest (tests/support/), with which a
dense model answers in plain torch. For tests on machines without a GPU, and for nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

import setup_env
from setup_env import ROOT, pip, run, say

REQUIREMENTS = ROOT / "tools" / "sglang"
SUPPORT = ROOT / "tests" / "support"


class Environment(NamedTuple):
    """A virtual environment of this checkout. ``stand_ins`` are packages that exist for GPUs."""

    version: str
    stand_ins: tuple[str, ...]
    torch: str = "2.13.0"
    extras: str = "test"

    @property
    def folder(self) -> str:
        return f".venv-sglang-{self.version}"

    @property
    def path(self) -> Path:
        return ROOT / self.folder

    @property
    def python(self) -> Path:
        return self.path / "bin" / "python"

    @property
    def stamp(self) -> Path:
        return self.path / "kvcached-setup.stamp"

    @property
    def requirements(self) -> Path:
        return REQUIREMENTS / f"requirements-{self.version}.txt"


NEWEST = "0.5.23"
KERNELS = ("torchvision", "sgl_kernel")
ENVIRONMENTS = {
    env.version: env
    for env in (
        Environment("0.4.6.post2", (*KERNELS, "vllm", "torchao")),
        Environment("0.4.9", (*KERNELS, "vllm", "torchao")),
        Environment("0.5.10", (*KERNELS, "torchao")),
        Environment("0.5.15", (*KERNELS, "torchao")),
        Environment("0.5.23", KERNELS),
    )
}


def inputs_hash(env: Environment) -> str:
    """What the environment depends on, sources of the core left out."""
    digest = hashlib.sha256(setup_env.inputs_hash(env).encode())
    for path in (Path(__file__), env.requirements):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def install_sglang(env: Environment) -> None:
    say(f"installing SGLang {env.version} and what it needs on a CPU")
    pin = f"torch=={setup_env.installed_version(env, 'torch')}"
    pip(env, "install SGLang's requirements", "install", "-r", str(env.requirements), pin)
    pip(env, "install SGLang", "install", "--no-deps", f"sglang=={env.version}")
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run("find site-packages", [str(env.python), "-c", script]).strip())
    names = ", ".join(repr(name) for name in env.stand_ins)
    (packages / "sglang_stand_ins.pth").write_text(
        f"import sys; sys.path.append({str(SUPPORT)!r}); import sglang_stand_ins; "
        f"sglang_stand_ins.stand_in({names})\n"
    )


def check(env: Environment) -> None:
    """Imports what an engine imports; what is missing shows here and not in an engine's log."""
    script = "import sglang.srt.managers.scheduler, sglang.srt.entrypoints.http_server, kvcached"
    run("import SGLang and kvcached", [str(env.python), "-c", script])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--force", action="store_true", help="build again from nothing")
    parser.add_argument(
        "version", nargs="?", choices=sorted(ENVIRONMENTS), default=NEWEST, help="of SGLang"
    )
    options = parser.parse_args()
    env = ENVIRONMENTS[options.version]
    steps = (setup_env.install_torch, install_sglang, setup_env.install_kvcached, check)
    again = f"setup_sglang.py {options.version}"
    return setup_env.build(env, inputs_hash(env), options.force, steps, again)


if __name__ == "__main__":
    sys.exit(main())
