#!/usr/bin/env python3
"""Brings Debian's prometheus and chromium into build/debian/, for the tests of the exporter.

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
PROGRAMS = {"prometheus": "usr/bin/prometheus", "chromium": "usr/lib/chromium/chromium"}


def missing_packages(program: str) -> list[str]:
    """The packages that apt would install for it, by their names."""
    command = ["apt-get", "install", "--simulate", "--no-install-recommends", program]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [line.split()[1] for line in lines if line.startswith("Inst ")]


def bring(program: str) -> None:
    if (TARGET / PROGRAMS[program]).exists() or shutil.which(program):
        print(f"{program}: there")
        return
    packages = missing_packages(program)
    # Prometheus needs nothing but itself to run; its package names a web console's files too.
    packages = [program] if program == "prometheus" else packages
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
              "prometheus and chromium", file=sys.stderr)  # fmt: skip
        return 1
    try:
        for program in PROGRAMS:
            bring(program)
    except subprocess.CalledProcessError as error:
        print(f"{error}\nrun: apt-get update", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
