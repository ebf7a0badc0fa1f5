#!/usr/bin/env python3
"""How fast cached memory goes to an engine that needs it, and what its owner feels.

Two engines with kvcached on one GPU. A fills all memory with cached prefixes. Then B gets a burst
of prompts for 20 GiB of KV cache, twice: while A is at rest, and while A answers requests. The
ledger is read every millisecond: how long after B's demand appears A's charge has fallen, and how
far. A's steps are timed: what its running requests felt.
"""

from __future__ import annotations

import itertools
import json
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fleet
from engine import GIB, Job
from fleet import Fleet
from sharing import Watch, pause, until

from kvcached import nvml
from kvcached.bench import pictures
from kvcached.ledger import Ledger

WAVES = (("idle", "burst"), ("busy", "another-burst"))


@dataclass(frozen=True, slots=True)
class Sample:
    """What the ledger said at one moment of the monotonic clock. Sizes in bytes."""

    at_s: float
    a_charge: int
    b_charge: int
    b_demand: int


@dataclass(slots=True)
class LedgerWatch:
    """Reads the ledger in a thread, from ``with`` to its end."""

    ledger: Ledger
    samples: list[Sample] = field(default_factory=list)
    _end: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> LedgerWatch:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        assert self._thread is not None
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(0.001):
            accounts = {account.name: account for account in self.ledger.snapshot().accounts}
            a, b = accounts["a"], accounts["b"]
            self.samples.append(Sample(time.monotonic(), a.charge, b.charge, b.demand))


def movement(samples: Sequence[Sample]) -> dict[str, Any]:
    """What moved from A to B, how long it took, and how long B waited for memory at a time."""
    first = next((index for index, one in enumerate(samples) if one.b_demand), None)
    if first is None:
        return {"problem": "B was never short of memory"}
    asked, before = samples[first].at_s, samples[first].a_charge
    least = min(one.a_charge for one in samples[first:])
    half = next(s.at_s for s in samples[first:] if before - s.a_charge >= (before - least) / 2)
    most = next(s.at_s for s in samples[first:] if before - s.a_charge >= 0.95 * (before - least))
    waits, since = [], None
    for one in samples[first:]:
        if one.b_demand and since is None:
            since = one.at_s
        elif not one.b_demand and since is not None:
            waits.append(one.at_s - since)
            since = None
    waits.sort()
    return {
        "demand_gib": max(one.b_demand for one in samples) / GIB,
        "a_gave_gib": (before - least) / GIB,
        "half_ms": 1e3 * (half - asked),
        "most_ms": 1e3 * (most - asked),
        "gib_per_s": 0.95 * (before - least) / GIB / max(most - asked, 1e-3),
        "b_grew_gib": (max(s.b_charge for s in samples) - samples[first].b_charge) / GIB,
        "waits": len(waits),
        "wait_p50_ms": 1e3 * waits[len(waits) // 2] if waits else None,
        "wait_longest_ms": 1e3 * waits[-1] if waits else None,
        "curve": curve(samples, asked),
    }


def curve(samples: Sequence[Sample], asked_s: float) -> list[list[float]]:
    """[ms after the demand, A's and B's charge and B's demand in GiB], where any of them changed;
    two seconds of it.
    """
    rows: list[list[float]] = []
    for one in samples:
        sizes = [round(size / GIB, 3) for size in (one.a_charge, one.b_charge, one.b_demand)]
        at_ms = round(1e3 * (one.at_s - asked_s), 1)
        if -100 < at_ms < 2000 and (not rows or rows[-1][1:] != sizes):
            rows.append([at_ms, *sizes])
    return rows


def step_times(ends: Sequence[float], since: float, until: float) -> dict[str, Any]:
    """How long an engine's steps took between two moments."""
    pairs = itertools.pairwise(ends)
    steps = sorted(b - a for a, b in pairs if since <= a and b <= until)
    if not steps:
        return {"steps": 0}
    return {
        "steps": len(steps),
        "p50_ms": 1e3 * steps[len(steps) // 2],
        "p99_ms": 1e3 * steps[int(0.99 * len(steps))],
        "longest_ms": 1e3 * steps[-1],
    }


def pair(model: str, out: Path, runner: str, kv_gib: float | None) -> tuple[Job, Job]:
    def job(name: str, work: tuple[str, ...]) -> Job:
        return Job(
            name=name,
            model=model,
            work=work,
            elastic=True,
            ledger=str(out / "ledger"),
            runner=runner,
            prefix_caching=True,
            max_seqs=256,
            kv_bytes=None,
            capacity_bytes=None if kv_gib is None else int(kv_gib * GIB),
            sharpen=False,
            ready_file=str(out / f"ready-{name}"),
            start_files=tuple(str(out / f"start-{name}-{each}") for each in work),
            hold_file=str(out / "end"),
        )

    return job("a", ("fill", "refill", "decode")), job("b", ("burst", "forget", "another-burst"))


@dataclass(slots=True)
class Stage:
    """Two engines and what is known of how far they are."""

    engines: Fleet
    watch: Watch
    jobs: tuple[Job, Job]

    def start_engines(self) -> None:
        for job in self.jobs:
            for path in (job.ready_file, *job.start_files, job.hold_file):
                Path(path).unlink(missing_ok=True)
        for job in self.jobs:
            self.engines.start(job)
            until(Path(job.ready_file).exists, self.watch, self.engines, job)

    def begin(self, job: Job, work: str) -> None:
        Path(job.start_files[job.work.index(work)]).touch()

    def finish(self, job: Job, work: str) -> None:
        path = self.engines.folder / f"{job.name}.json"
        until(lambda: work in json.loads(path.read_text())["work"], self.watch, self.engines, job)

    def do(self, job: Job, work: str) -> None:
        self.begin(job, work)
        self.finish(job, work)


def play(stage: Stage, ledger: Ledger) -> dict[str, list[Sample]]:
    """Both waves; what the ledger said meanwhile, and when B's burst in the busy one began."""
    a, b = stage.jobs
    seen = {}
    stage.do(a, "fill")
    pause(1.5, stage.watch)  # at rest
    with LedgerWatch(ledger) as watch:
        stage.do(b, "burst")
    seen["idle"] = watch.samples
    stage.do(b, "forget")
    stage.do(a, "refill")
    stage.begin(a, "decode")
    pause(5.0, stage.watch)
    with LedgerWatch(ledger) as watch:
        stage.do(b, "another-burst")
    seen["busy"] = watch.samples
    stage.finish(a, "decode")
    return seen


def figures(seen: dict[str, list[Sample]], results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    a, b = results["a"]["work"], results["b"]["work"]
    told: dict[str, Any] = {}
    for wave, burst in WAVES:
        told[wave] = movement(seen[wave]) | {
            "ttft_p50_s": b[burst]["ttft_p50_s"],
            "ttft_p99_s": b[burst]["ttft_p99_s"],
            "seconds": b[burst]["seconds"],
        }
    asked = next((s.at_s for s in seen["busy"] if s.b_demand), seen["busy"][0].at_s)
    ends, over = a["decode"]["step_ends"], b["another-burst"]["step_ends"][-1]
    told["a_steps"] = {
        "alone": step_times(ends, ends[0] + 2.0, seen["busy"][0].at_s),
        "while B takes memory": step_times(ends, asked, asked + 1.0),
        "while B computes": step_times(ends, asked + 1.0, over),
    }
    return told


def table(told: dict[str, Any]) -> str:
    lines = [
        f"{'A is':6} {'B asked':>8} {'A gave':>8} {'half':>8} {'95 %':>8} {'GiB/s':>6}  TTFT p50"
    ]
    for wave, _ in WAVES:
        one = told[wave]
        if "problem" in one:
            lines.append(f"{wave:6} {one['problem']}")
            continue
        lines.append(
            f"{wave:6} {one['demand_gib']:4.1f} GiB {one['a_gave_gib']:4.1f} GiB "
            f"{one['half_ms']:5.1f} ms {one['most_ms']:5.1f} ms {one['gib_per_s']:6.0f}  "
            f"{one['ttft_p50_s']:.2f} s; {one['waits']} waits, p50 {one['wait_p50_ms']} ms, "
            f"longest {one['wait_longest_ms']} ms"
        )
    lines += [f"A's steps {when}: {json.dumps(each)}" for when, each in told["a_steps"].items()]
    return "\n".join(lines)


def main() -> int:
    parser = fleet.parser(__doc__, limit_s=300.0)
    parser.add_argument("--runner", choices=("V1", "V2"), default="V2")
    parser.add_argument("--plot", type=Path, help="a PNG to write; needs matplotlib")
    parser.add_argument(
        "--kv-gib",
        type=float,
        help="KV memory of both together: 56 where more than 80 GB would not get full",
    )
    options = parser.parse_args()
    out = options.out
    model = fleet.make_model(out / "models", options.shape)
    fleet.preload()
    uuid = fleet.gpu_uuid()
    stage = Stage(
        Fleet(out, options.limit),
        Watch(nvml.Gpu(uuid)),
        pair(model, out, options.runner, options.kv_gib),
    )
    stage.start_engines()
    with Ledger.open(out / "ledger", uuid, create=False, read_only=True) as ledger:
        seen = play(stage, ledger)
    Path(stage.jobs[0].hold_file).touch()
    stage.engines.finish(stage.watch.tick)
    told = figures(seen, stage.engines.results)
    (out / "reclaim.json").write_text(json.dumps(told, indent=1))
    if options.plot is not None:
        pictures.moved(told, options.plot)
    print(table(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
