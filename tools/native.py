#!/usr/bin/env python3
"""Builds C++ programs of tests/native/ on the core, without Python: for sanitizers and simulations.

    python3 tools/native.py asan stress        prints where the program lies: build/native/asan/...
    python3 tools/native.py --list             the flavours and programs

Only what has changed is compiled anew. Standard library only, Python 3.10 or newer.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests" / "native"
BUILD = ROOT / "build" / "native"
DEBIAN = ROOT / "build" / "debian"

COMMON = ("-std=c++17", "-g1", "-Wall", "-Wextra", "-Werror", "-fno-omit-frame-pointer")
ADDRESS = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
# What a flavour is compiled and linked with.
FLAVOURS: dict[str, tuple[str, ...]] = {
    "plain": ("-O2",),
    "asan": ADDRESS,
    # It knows no fences; what stands around ours is atomic itself.
    "tsan": ("-O1", "-fsanitize=thread", "-Wno-unknown-warning-option", "-Wno-tsan"),
    "fuzz": ("-O1", "-fsanitize=fuzzer-no-link,address,undefined", "-fno-sanitize-recover=all"),
}
# The sources of a program, beside the core's.
PROGRAMS: dict[str, tuple[str, ...]] = {
    "stress": ("stress.cpp",),
    "fuzz_ledger": ("fuzz_ledger.cpp", "fuzz_loop.cpp"),
    "simulate": ("simulate.cpp", "sim_backend.cpp", "sim_memory.cpp", "sim_process.cpp",
                 "sim_steps.cpp", "sim_checks.cpp", "sim_world.cpp"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Toolchain:
    """A compiler, and the environment that it needs to run."""

    compiler: str
    environment: dict[str, str]


class Unavailable(Exception):
    """What is missing on this machine, in words."""


def toolchain(flavour: str) -> Toolchain:
    """The machine's own compiler; for libFuzzer, clang from the machine or from build/debian/."""
    if flavour != "fuzz":
        compiler = shutil.which(os.environ.get("CXX", "c++"))
        if compiler is None:
            raise Unavailable("a C++ compiler is needed ($CXX or c++)")
        return Toolchain(compiler, dict(os.environ))
    unpacked = DEBIAN / "usr" / "lib" / "llvm-19"
    if (unpacked / "bin" / "clang++").exists():
        libraries = f"{unpacked / 'lib'}:{DEBIAN / 'usr' / 'lib' / 'x86_64-linux-gnu'}"
        return Toolchain(
            str(unpacked / "bin" / "clang++"), {**os.environ, "LD_LIBRARY_PATH": libraries}
        )
    compiler = shutil.which("clang++")
    if compiler is None:
        raise Unavailable("libFuzzer needs clang++ (make programs-clang brings it)")
    return Toolchain(compiler, dict(os.environ))


@functools.cache
def check(flavour: str) -> None:
    """Raises Unavailable where the compiler cannot build a program of this flavour that runs."""
    tools = toolchain(flavour)
    folder = BUILD / flavour
    folder.mkdir(parents=True, exist_ok=True)
    source, program = folder / "check.cpp", folder / "check"
    source.write_text("int main() { return 0; }\n")
    command = [tools.compiler, *FLAVOURS[flavour], str(source), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, env=tools.environment)
    if built.returncode != 0 or subprocess.run([program], capture_output=True).returncode != 0:
        raise Unavailable(f"{tools.compiler} does not support {' '.join(FLAVOURS[flavour])}")


def core_sources(csrc: Path) -> list[Path]:
    """The core without its bindings."""
    return sorted(csrc.glob("*.cpp"))


def build(
    flavour: str,
    program: str,
    csrc: Path = ROOT / "csrc",
    into: Path = BUILD,
    keep: bool = False,
) -> Path:
    """Compiles what has changed and links; returns the program. Raises Unavailable.

    ``keep``: objects of other versions of a source stay, for several cores that differ little.
    """
    check(flavour)
    folder = into / flavour
    folder.mkdir(parents=True, exist_ok=True)
    sources = [*core_sources(csrc), *(TESTS / name for name in PROGRAMS[program])]
    headers = sorted([*csrc.glob("*.hpp"), *TESTS.glob("*.hpp")])
    own = PROGRAMS[program][-1] if flavour == "fuzz" else None  # libFuzzer has a loop of its own
    sources = [path for path in sources if path.name != own]
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        compile_one = functools.partial(
            compile_object, flavour, folder, csrc, content_hash(headers), keep
        )
        objects = list(pool.map(compile_one, sources))
    linked = folder / program
    stamp = folder / f"{program}.linked"
    digest = content_hash(objects)
    if not linked.exists() or not stamp.exists() or stamp.read_text() != digest:
        flags = [flag.replace("fuzzer-no-link", "fuzzer") for flag in FLAVOURS[flavour]]
        run(flavour, [*flags, *map(str, objects), "-o", str(linked), "-ldl", "-pthread"])
        stamp.write_text(digest)
    return linked


def compile_object(
    flavour: str, folder: Path, csrc: Path, headers: str, keep: bool, source: Path
) -> Path:
    flags = (*COMMON, *FLAVOURS[flavour], f"-I{csrc}", f"-I{TESTS}")
    compiler = toolchain(flavour).compiler
    digest = content_hash([source], headers, compiler, *FLAVOURS[flavour])
    target = folder / f"{source.stem}-{digest[:16]}.o"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}.part")
        run(flavour, [*flags, "-c", str(source), "-o", str(partial)])
        for old in folder.glob(f"{source.stem}-????????????????.o"):
            if not keep:
                old.unlink(missing_ok=True)
        partial.rename(target)
    return target


def run(flavour: str, arguments: Sequence[str]) -> None:
    tools = toolchain(flavour)
    done = subprocess.run(
        [tools.compiler, *arguments], capture_output=True, text=True, env=tools.environment
    )
    if done.returncode != 0:
        raise SystemExit(f"{shlex.join([tools.compiler, *arguments])}\n{done.stderr}")


def content_hash(files: Iterable[Path], *more: str) -> str:
    digest = hashlib.sha256("\0".join(more).encode())
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("flavour", nargs="?", choices=FLAVOURS)
    parser.add_argument("program", nargs="?", choices=PROGRAMS)
    parser.add_argument("--list", action="store_true", help="the flavours and programs")
    options = parser.parse_args()
    if options.list or not options.program:
        print("flavours:", ", ".join(FLAVOURS), "\nprograms:", ", ".join(PROGRAMS))
        return 0
    try:
        print(build(options.flavour, options.program))
    except Unavailable as reason:
        print(f"native: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
