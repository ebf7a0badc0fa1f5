"""Short samples of the long runs: sanitizers, the fuzzer's corpus, the simulation.

The long ones are ``make sanitize``, ``make fuzz``, ``make soak`` and ``make mutants``.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

CORPUS = Path(__file__).parent / "corpus" / "ledger"
Build = Callable[[str, str], Path]


def run(
    folder: Path, program: Path, *arguments: str, **more: str
) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        **more,
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
    }
    return subprocess.run(
        [str(program), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        cwd=folder,
    )


def passed(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def simulate(folder: Path, program: Path, **options: int) -> dict[str, Any]:
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    result: dict[str, Any] = json.loads(passed(run(folder, program, *arguments)))
    return result


@pytest.mark.parametrize("flavour", ["asan", "tsan"])
def test_threads_side_by_side_under_a_sanitizer(build: Build, flavour: str, tmp_path: Path) -> None:
    said = passed(run(tmp_path, build(flavour, "stress"), "3"))
    numbers = [int(number) for number in re.findall(r"\d+", said)]
    assert numbers[0] > 0 and numbers[3] > numbers[4] // 4, said  # neighbours died, memory was used


def test_the_reader_survives_every_file_of_the_corpus(build: Build, tmp_path: Path) -> None:
    said = passed(run(tmp_path, build("asan", "fuzz_ledger"), str(CORPUS), "4"))
    inputs, executions = (
        int(number) for number in re.findall(r"(\d+) (?:inputs|executions)", said)
    )
    assert inputs == len(list(CORPUS.iterdir())) > 20
    assert executions > 1000


def test_a_sample_of_the_simulation(build: Build, tmp_path: Path) -> None:
    said = simulate(tmp_path, build("asan", "simulate"), seeds=10, steps=3000)
    assert said["steps"] >= 10 * 3000
    for event in ("killed_at_a_call", "killed_between_steps", "calls_refused", "leases_refused",
                  "locks_stolen", "left", "storms", "rows_reaped"):  # fmt: skip
        assert said[event] > 0, event


def test_the_simulation_runs_on_the_cuda_backend(build: Build, tmp_path: Path) -> None:
    """With the simulated driver; on a GPU it is ``make soak BACKEND=cuda``."""
    source = Path(__file__).parents[1] / "conformance" / "simulated_driver.cpp"
    library = tmp_path / "libcuda.so.1"
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, "-std=c++17", "-shared", "-fPIC", "-o", str(library), str(source)]
    program = build("asan", "simulate")
    subprocess.run(command, check=True)
    arguments = ["--backend", "cuda", "--seeds", "4", "--steps", "2000"]
    said = json.loads(passed(run(tmp_path, program, *arguments, LD_LIBRARY_PATH=str(tmp_path))))
    assert said["backend"] == "cuda" and said["steps"] >= 8000
    assert said["killed_at_a_call"] > 0 and said["calls_refused"] > 0


def test_a_seed_repeats_exactly(build: Build, tmp_path: Path) -> None:
    program = build("asan", "simulate")
    first = simulate(tmp_path, program, seed=77, steps=2000)
    again = simulate(tmp_path, program, seed=77, steps=2000)
    other = simulate(tmp_path, program, seed=78, steps=2000)
    same = [name for name in first if name not in ("seconds", "steps_per_s")]
    assert {name: first[name] for name in same} == {name: again[name] for name in same}
    assert first["digest"] != other["digest"]


def test_every_planted_bug_can_still_be_planted(tools: Callable[[str], ModuleType]) -> None:
    mutants = tools("mutants")
    assert len(mutants.MUTANTS) >= 10
    for mutant in mutants.MUTANTS.values():
        text = (mutants.CSRC / mutant.file).read_text()
        assert mutant.applied(text) != text
