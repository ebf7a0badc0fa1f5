#!/usr/bin/env python3
"""Brings Debian's prometheus and chromium into build/debian/, for the tests of the exporter.

    python3 tools/operator_programs.py           those two
    python3 tools/operator_programs.py clang     clang with libFuzzer, for make fuzz

Nothing is installed and no root is needed: packages that this machine lacks are downloaded with apt
and unpacked. Where the programs are installed already, the tests find them without this.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "build" / "debian"
PROGRAMS = {
    "prometheus": "usr/bin/prometheus",
    "chromium": "usr/lib/chromium/chromium",
    "clang": "usr/lib/llvm-19/bin/clang++",
}
# What is brought where not all that apt would install is needed.
PACKAGES = {
    "prometheus": ("prometheus",),  # its package names a web console's files too
    "clang": ("clang-19", "libclang1-19", "libclang-common-19-dev", "libclang-cpp19",
              "libclang-rt-19-dev", "libllvm19"),
}  # fmt: skip


def missing_packages(program: str) -> list[str]:
    """The packages that apt would install for it, by their names."""
    command = ["apt-get", "install", "--simulate", "--no-install-recommends", program]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [line.split()[1] for line in lines if line.startswith("Inst ")]


def bring(program: str) -> None:
    if (TARGET / PROGRAMS[program]).exists() or shutil.which(Path(PROGRAMS[program]).name):
        print(f"{program}: there")
        return
    packages = PACKAGES.get(program) or missing_packages(program)
    folder = TARGET / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", *packages], check=True, cwd=folder)
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", str(package), str(TARGET)], check=True)
        package.unlink()
    print(f"{program}: {len(packages)} packages unpacked into {TARGET.relative_to(ROOT)}")


def main() -> int:
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        print("this needs apt-get and dpkg (Debian, Ubuntu); elsewhere install "
              "prometheus, chromium and clang", file=sys.stderr)  # fmt: skip
        return 1
    try:
        for program in sys.argv[1:] or ["prometheus", "chromium"]:
            bring(program)
    except subprocess.CalledProcessError as error:
        print(f"{error}\nrun: apt-get update", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
