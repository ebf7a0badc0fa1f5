#!/usr/bin/env python3
"""Packs FlashInfer for vLLM 0.24 on a GPU machine that has a compiler and no package index.

    python3 benchmarks/gpu/flashinfer_pack.py FOLDER     here: FOLDER/flashinfer.tar.xz
    tar -xJf FOLDER/flashinfer.tar.xz -C FOLDER          there: FOLDER/site, for PYTHONPATH

FlashInfer compiles its kernels where they run, from sources that are part of its package;
``flashinfer_build.py`` does so beforehand, all at once. With ``--built CACHE``, a folder that it
made on another machine of the same kind, the pack holds the kernels and nothing is compiled there.
Standard library and pip only.
"""

from __future__ import annotations

import argparse
import shutil
import tarfile
from pathlib import Path

from sglang_pack import download, platforms, unpack

# The versions that vLLM 0.24 wants; the second is what calls the kernels.
PACKAGES = ("flashinfer-python==0.6.12", "apache-tvm-ffi==0.1.9")
PYTHON = "3.12"


def add_kernels(cache: Path, site: Path) -> None:
    """Puts kernels where FlashInfer looks before it compiles."""
    for library in sorted(cache.glob("**/cached_ops/*/*.so")):
        target = site / "flashinfer/data/aot" / library.stem
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(library, target / library.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--built", type=Path, help="FLASHINFER_WORKSPACE_BASE of a build")
    options = parser.parse_args()
    folder, site = options.folder, options.folder / "site"
    shutil.rmtree(site, ignore_errors=True)
    for name in PACKAGES:
        download(folder / "wheels", name, PYTHON, *platforms())
    for wheel in sorted((folder / "wheels").glob("*.whl")):
        unpack(wheel, site)
    if options.built is not None:
        add_kernels(options.built, site)
    packed = folder / "flashinfer.tar.xz"
    with tarfile.open(packed, "w:xz") as archive:
        archive.add(site, "site")
    print(f"{packed}: {packed.stat().st_size / (1 << 20):.1f} MiB")


if __name__ == "__main__":
    main()
