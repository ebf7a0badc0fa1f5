#!/usr/bin/env python3
"""Packs SGLang 0.5.15 for a GPU machine that has PyTorch 2.11 and no package index.

    python3 benchmarks/gpu/sglang_pack.py FOLDER         here: FOLDER/sglang.tar.xz
    tar -xJf FOLDER/sglang.tar.xz -C FOLDER              there: FOLDER/site, for PYTHONPATH

What SGLang computes with on a GPU, its kernels' package and FlashInfer, is hundreds of megabytes
and stays out: ``sglang_startup`` has SGLang compute in plain torch in its place, with attention in
Triton. So does what guides answers by grammars. Standard library and pip only.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

PYTHON = "3.12"
SGLANG = "sglang==0.5.15"
# What it imports and what that machine's image has not, or has in a version too new for it.
PACKAGES = (
    "annotated-types",
    "apache-tvm-ffi==0.1.11",
    "compressed-tensors",
    "dill",
    "distro",
    "fastapi",
    "gguf",
    "interegular",
    "jiter",
    "jsonschema",
    "jsonschema-specifications",
    "loguru",
    "msgspec",
    "openai==2.6.1",
    "opentelemetry-api",
    "orjson",
    "partial_json_parser",
    "pybase64",
    "pydantic==2.14.4",
    "pydantic-core==2.50.5",
    "python-multipart",
    "pyzmq",
    "referencing",
    "rpds-py",
    "setproctitle",
    "sniffio",
    "starlette",
    "tokenizers==0.22.2",
    "transformers==5.12.1",
    "typing-inspection",
    "uvicorn",
    "watchfiles",
)
GLIBC = (39, 35, 34, 31, 28, 27, 26, 24, 17, 12, 5)  # manylinux_2_N: pip matches each exactly
LEFT_OUT = (
    "sglang/multimodal_gen/",
    "sglang/test/",
    "sglang/srt/grpc/_core",
)


def download(folder: Path, name: str, python: str, *platforms: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp", "-d", str(folder)]
    tag = f"cp{python.replace('.', '')}"
    command += [word for abi in ("abi3", tag, "none") for word in ("--abi", abi)]
    command += [word for platform in platforms for word in ("--platform", platform)]
    subprocess.run([*command, name], check=True)


def platforms() -> list[str]:
    old = ["manylinux2014_x86_64", "manylinux1_x86_64"]
    return [*(f"manylinux_2_{number}_x86_64" for number in GLIBC), *old]


def wheels(folder: Path) -> Iterator[Path]:
    # Its wheels name a Python version for one compiled module, which is not needed.
    download(folder, SGLANG, "3.11", *platforms())
    for name in PACKAGES:
        download(folder, name, PYTHON, *platforms())
    yield from sorted(folder.glob("*.whl"))


def unpack(wheel: Path, site: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.startswith(LEFT_OUT)]
        archive.extractall(site, names)


def main() -> None:
    folder = Path(sys.argv[1])
    site = folder / "site"
    shutil.rmtree(site, ignore_errors=True)
    for wheel in wheels(folder / "wheels"):
        unpack(wheel, site)
    packed = folder / "sglang.tar.xz"
    with tarfile.open(packed, "w:xz") as archive:
        archive.add(site, "site")
    print(f"{packed}: {packed.stat().st_size / (1 << 20):.1f} MiB")


if __name__ == "__main__":
    main()
