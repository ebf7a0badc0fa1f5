#!/usr/bin/env python3
"""Runs the engine tests with every supported version of vLLM and SGLang; writes docs/engines.md.

    python3 tools/matrix.py                        all versions, everything (hours)
    python3 tools/matrix.py 0.26 sglang-0.5.15     these versions of vLLM and of SGLang
    python3 tools/matrix.py 0.26 -- ARGS           with these arguments for pytest, as for a part of
                                                   the tests; parts of one version add up
    python3 tools/matrix.py --page                 writes the page from what has run

Results lie in build/matrix/ as pytest writes them. Of a version without any there, the page keeps
its row. Standard library only, Python 3.10 or newer.
"""

from __future__ import annotations

import argparse
import datetime
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import setup_env
import setup_sglang

ROOT = setup_env.ROOT
RESULTS = ROOT / "build" / "matrix"
PAGE = ROOT / "docs" / "engines.md"
HEADER = "| version | real engine on a CPU | real classes | on a GPU | last run |"
# What a GPU has run: by hand (benchmarks/gpu), so said here.
ON_GPU = {
    "0.24": "H100 and H200, V1 and V2 runner ([performance](performance.md))",
    "sglang-0.5.15": "H200, Triton attention",
}
INTRODUCTION = """\
# Engines

What was run with which version of an engine. `make matrix` runs it again and writes this page; each
version has an environment of its own (`tools/setup_env.py`, `tools/setup_sglang.py`).

- *real engine on a CPU*: tests that start the engine, with kvcached and without it, and compare
  what it answers. vLLM 0.8.4 runs on GPUs only: here its real engine, with its scheduler and its
  processes, runs around a toy model in place of its model runner (in its last run these tests were
  still counted as classes).
- *real classes*: tests of the engine's own code without a model: its block pool or allocators, its
  KV-cache manager, its scheduler, its tensors.
- Numbers are tests that passed; then those that failed, and those that do not apply to the version.
  Of SGLang they are all of `tests/sglang` (of 0.5.15 without `kvcached serve`; 0.4 does not run
  with two ranks on a CPU), of vLLM 0.32 all of `tests/engines` but the long ones.
  Of older vLLM they are outputs against plain vLLM's, pool programs on the real classes, bursts,
  requests that never fit, sleep and the self-test; of 0.8.4 what can run without a GPU.

At start, in the engine's own processes, kvcached compares the signatures and attributes that it
counts on with those of the engine that is there, and refuses by name what has changed; it looks
whether the KV cache lies where it maps memory, and whether the first step's pages are mapped
([integration](integration.md)). Of SGLang the signatures are compared.

**SGLang on a GPU** has been run with 0.5.15 and Triton attention (an H200, driver 580.159.04,
Python 3.12, torch 2.11, float32, 2026-11-30; `sglang_equality.py`): in eleven cases (memory for all
requests and for a part of them, with and without radix cache, `page_size` 1, 16 and 64, prompts in
pieces, no overlap, zeros under holes, all layers of a slot together, decoding by CUDA graphs) each
of 48 answers, asked twice, was that of transformers, as plain SGLang's were; no leak was found, no
capacity exceeded, and the memory was back afterwards. What SGLang computes with there by default
(`sglang-kernel`, FlashInfer) is some hundreds of megabytes, and that machine reaches no package
index: everything but attention ran in plain torch, which each of SGLang's operations has beside the
kernel (`benchmarks/gpu/sglang_startup`). Other attention backends than `triton` are not refused,
and the log says that they have not been run. Other versions are refused on a GPU. Not begun: room
for the weights of an engine that starts beside full ones, as vLLM's have it.

**DeepSeek's latent attention (MLA) with SGLang on a CPU** has not been run; its KV caches and their
allocators are tested as classes. Plain SGLang 0.5.10 does not build a small DeepSeek model on a
CPU: its rotary embedding there insists on scaled positions (`get_rope_cpu`). Beyond that,
`torch_native`, the one attention that computes on any CPU, reads the KV cache also for prompts
without a cached prefix, for which SGLang hands uncompressed keys and values to its attention: a
test has to have SGLang take the other of its two ways (`AttnForwardMethod.MLA`) for all of them.
"""


class Results:
    """What the tests of one version said, by kind (``real engine``, ``real classes``)."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.outcomes: dict[str, str] = {}  # of each test, in its last run
        self.kinds: dict[str, str] = {}
        self.last_s = 0.0
        for file in sorted(files, key=lambda file: file.stat().st_mtime):
            self.last_s = file.stat().st_mtime
            for case in ET.parse(file).iter("testcase"):
                name = f"{case.get('classname')}::{case.get('name')}"
                self.outcomes[name] = _outcome(case)
                for prop in case.iter("property"):
                    if prop.get("name") == "runs":
                        self.kinds[name] = str(prop.get("value"))

    def count(self, kind: str) -> Counter[str]:
        return Counter(o for name, o in self.outcomes.items() if self.kinds.get(name) == kind)

    def cell(self, kind: str) -> str:
        """In words: ``31 passed, 2 failed, 4 do not apply``."""
        counts = self.count(kind)
        if not counts["passed"] and not counts["failed"]:
            return "no"
        words = [f"{counts['passed']} passed"]
        words += [f"**{counts['failed']} failed**"] if counts["failed"] else []
        words += [f"{counts['skipped']} do not apply"] if counts["skipped"] else []
        return ", ".join(words)

    def engine_cell(self) -> str:
        """Of tests that start the engine, with a model or, failing that, with a toy one."""
        real, toy = self.cell("real engine"), self.cell("toy model")
        return real if toy == "no" else f"toy model: {toy}"


def _outcome(case: ET.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    return "skipped" if case.find("skipped") is not None else "passed"


class Version(NamedTuple):
    """A version of an engine: what the page calls it, and how its tests are run."""

    label: str
    reports: str  # what the names of its reports begin with
    python: Path
    set_up: tuple[str, ...]  # a script of this folder, and its arguments
    tests: tuple[str, ...]  # arguments for pytest


def _versions() -> dict[str, Version]:
    """All of them, by what the command line calls them."""
    vllm_tests = ("-m", "not slow and not gpu", "tests/engines")
    found = {}
    for key, env in setup_env.ENVIRONMENTS.items():
        set_up = ("setup_env.py", "--vllm", key)
        found[key] = Version(f"vLLM {env.vllm}", f"vllm-{key}", env.python, set_up, vllm_tests)
    for key, own in setup_sglang.ENVIRONMENTS.items():
        name = f"sglang-{key}"
        set_up = ("setup_sglang.py", key)
        found[name] = Version(f"SGLang {key}", name, own.python, set_up, ("tests/sglang",))
    return found


VERSIONS = _versions()


def row(version: str, results: Results) -> str:
    """A version's line of the page."""
    day = datetime.date.fromtimestamp(results.last_s).isoformat()
    cells = [results.engine_cell(), results.cell("real classes"), ON_GPU.get(version, "no")]
    return f"| {VERSIONS[version].label} | {' | '.join(cells)} | {day} |"


def page(old: str, rows: Sequence[str]) -> str:
    """The page with these rows, and those of other versions as they were."""
    kept = {_name(line): line for line in old.splitlines() if line.startswith(("| vLLM ", "| SG"))}
    kept.update({_name(line): line for line in rows})
    lines = [kept[name] for name in sorted(kept, key=_version)]
    table = "\n".join([HEADER, "|---|---|---|---|---|", *lines])
    return f"{INTRODUCTION}\n{table}\n"


def _name(line: str) -> str:
    return line.split("|")[1].strip()


def _version(name: str) -> tuple[bool, list[int]]:
    return name.startswith("SGLang"), [int(number) for number in re.findall(r"\d+", name)]


def write_page() -> None:
    rows = []
    for version in VERSIONS:
        if files := reports_of(version):
            rows.append(row(version, Results(files)))
    old = PAGE.read_text() if PAGE.exists() else ""
    PAGE.write_text(page(old, rows))
    print(f"matrix: {PAGE.relative_to(ROOT)} has {len(rows)} new rows")


def run(version: str, arguments: Sequence[str]) -> int:
    """Sets a version up, runs the tests with it, and keeps what they say."""
    wanted = VERSIONS[version]
    script, *arguments_of_it = wanted.set_up
    subprocess.run([sys.executable, str(ROOT / "tools" / script), *arguments_of_it], check=True)
    build = [str(wanted.python), "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    report = RESULTS / f"{wanted.reports}-{next_number(version):03}.xml"
    # Of pytest's formats, one that has properties: what a test ran (the tests' conftest.py).
    reporting = ["-o", "junit_family=xunit1", f"--junitxml={report}"]
    tests = [str(wanted.python), "-m", "pytest", *reporting, *(arguments or wanted.tests)]
    print(f"== matrix: {wanted.label}", flush=True)
    return subprocess.run(tests, cwd=ROOT).returncode


def reports_of(version: str) -> list[Path]:
    """What pytest has said of a version so far."""
    return list(RESULTS.glob(f"{VERSIONS[version].reports}-[0-9]*.xml"))


def next_number(version: str) -> int:
    """A number that no report of this version has."""
    taken = [int(file.stem.rpartition("-")[2]) for file in reports_of(version)]
    return max(taken, default=-1) + 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", help="all, unless some are named")
    parser.add_argument("--page", action="store_true", help="only write the page")
    own, rest = _split(sys.argv[1:])
    options = parser.parse_args(own)
    unknown = {*options.versions} - {*VERSIONS}
    if unknown:
        parser.error(f"no environment for {', '.join(sorted(unknown))}")
    failed = []
    if not options.page:
        for version in options.versions or VERSIONS:
            if run(version, rest) != 0:
                failed.append(version)
    write_page()
    if failed:
        print(f"matrix: failed with {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What stands before and after ``--``."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


if __name__ == "__main__":
    sys.exit(main())
