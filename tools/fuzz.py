#!/usr/bin/env python3
"""Fuzzes the ledger's reader: with libFuzzer where clang is, else with a loop of our own.

    python3 tools/fuzz.py --seconds 600 [--seed 1] [--workers 1]

What it learns joins build/fuzz/corpus/; ``--merge`` puts the inputs that add coverage into
tests/native/corpus/. A finding lies in build/fuzz/. Standard library only.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import native

KEPT = native.TESTS / "corpus" / "ledger"
WORK = native.ROOT / "build" / "fuzz"


def with_libfuzzer(program: Path, options: argparse.Namespace) -> int:
    """Returns the executions; raises SystemExit with a finding."""
    grown = WORK / "corpus"
    grown.mkdir(parents=True, exist_ok=True)
    command = [
        str(program), str(grown), str(KEPT), f"-max_total_time={options.seconds}",
        f"-seed={options.seed}", "-max_len=512", "-timeout=20", "-print_final_stats=1",
        f"-artifact_prefix={WORK}/",
    ]  # fmt: skip
    if options.workers > 1:
        command += [f"-fork={options.workers}"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stderr[-6000:])
    found = re.search(r"number_of_executed_units: *(\d+)", done.stderr)
    coverage = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", done.stderr)
    print(f"fuzz: edges, features, inputs: {', '.join(coverage[-1]) if coverage else 'unknown'}")
    return int(found[1]) if found else 0


def merge(program: Path) -> None:
    """Keeps, of all inputs, a small set that reaches all the code that all of them reach."""
    fresh = WORK / "merged"
    fresh.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [str(program), "-set_cover_merge=1", str(fresh), str(KEPT), str(WORK / "corpus")],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    for old in KEPT.iterdir():
        if not old.name.startswith("regression"):
            old.unlink()
    for path in sorted(fresh.iterdir()):
        (KEPT / path.name[:12]).write_bytes(path.read_bytes())
        path.unlink()
    print(f"fuzz: {len(list(KEPT.iterdir()))} inputs in {KEPT.relative_to(native.ROOT)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--merge", action="store_true")
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("UBSAN_OPTIONS", "print_stacktrace=1")
    try:
        program = native.build("fuzz", "fuzz_ledger")
    except native.Unavailable as reason:
        print(f"fuzz: {reason}; without coverage then", file=sys.stderr)
        program = native.build("asan", "fuzz_ledger")
        arguments = [str(KEPT), str(options.seconds), str(options.seed)]
        return subprocess.run([str(program), *arguments], cwd=WORK).returncode
    if options.merge:
        merge(program)
        return 0
    print(f"fuzz: {with_libfuzzer(program, options)} executions without a finding")
    return 0


if __name__ == "__main__":
    sys.exit(main())
