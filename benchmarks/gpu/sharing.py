#!/usr/bin/env python3
"""Two engines on one GPU: a burst on one while the other is idle, and what idle ones hold.

Three set-ups answer the same burst (200 requests of 1024 tokens in and 512 out):

- alone: one plain engine that has the whole GPU
- halves: two plain engines with half of the GPU each; the burst goes to one of them
- shared: two engines with kvcached and one ledger; the burst goes to one, then to the other
- halves-both, shared-both: as above, but both engines get the burst at the same time

What the GPU says is in use is read while both are idle before the burst, and after it.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fleet
from engine import GIB, Job
from fleet import Fleet

from kvcached import nvml

WEIGHTS_BYTES = 15 * GIB  # of the 8B shape
PAIR_OF_PAGES = 64 << 20  # budgets are whole pages, also by half


@dataclass(slots=True)
class Watch:
    """What is in use on the GPU, sampled while a set-up runs; marks say what was going on."""

    gpu: nvml.Gpu
    samples: list[tuple[float, int]] = field(default_factory=list)
    marks: dict[str, float] = field(default_factory=dict)
    _next: float = 0.0

    def tick(self) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + 0.1
            self.samples.append((now, self.gpu.memory()[0]))

    def mark(self, name: str) -> None:
        self.marks.setdefault(name, time.monotonic())

    def used_gib(self, mark: str, before_s: float = 0.3) -> float:
        """Just before a mark."""
        at = self.marks[mark] - before_s
        past = [used for when, used in self.samples if when <= at]
        return (past[-1] if past else self.samples[0][1]) / GIB

    def peak_gib(self, since: str, until: str) -> float:
        start, end = self.marks[since], self.marks[until]
        return max(used for when, used in self.samples if start <= when <= end) / GIB


@dataclass(frozen=True, slots=True)
class SetUp:
    """Engines that are up together; bursts go to the first, then to the second if it has work, or
    to both at once.
    """

    name: str
    jobs: tuple[Job, ...]
    at_once: bool = False


def set_ups(model: str, out: Path, runner: str, kv_bytes: int | None) -> list[SetUp]:
    """``kv_bytes`` is what both engines have for KV caches, where it is not all of the GPU; an
    engine alone has that and the room for the other's weights.
    """
    sizes: tuple[dict[str, Any], ...] = (
        ({"utilization": 0.9}, {"utilization": 0.45}, {})
        if kv_bytes is None
        else (
            {"kv_bytes": kv_bytes + WEIGHTS_BYTES},
            {"kv_bytes": kv_bytes // 2},
            {"capacity_bytes": kv_bytes},
        )
    )
    whole, half, shared = sizes

    def job(set_up: str, which: str, work: str, **changes: Any) -> Job:
        name = f"{set_up}-{which}"
        return Job(
            name=name,
            model=model,
            work=(work,),
            ledger=str(out / "ledger"),
            runner=runner,
            max_seqs=256,
            sharpen=False,
            ready_file=str(out / f"ready-{name}"),
            start_files=(str(out / f"start-{name}"),),
            hold_file=str(out / f"end-{set_up}"),
            **({"kv_bytes": None} | changes),
        )

    return [
        SetUp("alone", (job("alone", "a", "throughput", **whole),)),
        SetUp(
            "halves",
            (
                job("halves", "a", "throughput", **half),
                job("halves", "b", "nothing", **half),
            ),
        ),
        SetUp(
            "shared",
            (
                job("shared", "a", "throughput", elastic=True, **shared),
                job("shared", "b", "throughput", elastic=True, **shared),
            ),
        ),
        SetUp(
            "halves-both",
            tuple(job("halves-both", which, "throughput", **half) for which in "ab"),
            at_once=True,
        ),
        SetUp(
            "shared-both",
            tuple(
                job("shared-both", which, "throughput", elastic=True, **shared) for which in "ab"
            ),
            at_once=True,
        ),
    ]


def play(set_up: SetUp, engines: Fleet, gpu: nvml.Gpu) -> dict[str, Any]:
    """Starts the engines one after the other, gives them their bursts in turn, ends them."""
    out = engines.folder
    for job in set_up.jobs:
        for path in (job.ready_file, *job.start_files, job.hold_file):
            Path(path).unlink(missing_ok=True)
    watch = Watch(gpu)
    watch.tick()
    baseline = watch.samples[0][1] / GIB
    for job in set_up.jobs:
        engines.start(job)
        until(lambda job=job: Path(job.ready_file).exists(), watch, engines, job)
    for wave in [set_up.jobs] if set_up.at_once else [(job,) for job in set_up.jobs]:
        pause(2.0, watch)
        for job in wave:
            watch.mark(f"start-{job.name}")
            Path(job.start_files[0]).touch()
        for job in wave:
            until(lambda job=job: worked(out, job), watch, engines, job)
            watch.mark(f"end-{job.name}")
    pause(4.0, watch)
    watch.mark("idle")
    Path(set_up.jobs[0].hold_file).touch()
    engines.finish(watch.tick)
    first = set_up.jobs[0]
    result: dict[str, Any] = {
        "set_up": set_up.name,
        "baseline_gib": baseline,
        "idle_before_gib": watch.used_gib(f"start-{first.name}"),
        "idle_after_gib": watch.used_gib("idle"),
        "bursts": {},
    }
    for job in set_up.jobs:
        work = engines.results[job.name]["work"].get("throughput")
        if work is not None:
            result["bursts"][job.name] = {
                "seconds": work["seconds"],
                "tokens_per_s": work["output_tokens_per_s"],
                "tpot_p99_ms": 1e3 * work["tpot_p99_s"],
                "preemptions": engines.results[job.name]["preemptions"],
                "peak_gib": watch.peak_gib(f"start-{job.name}", f"end-{job.name}"),
                "ledgers": engines.results[job.name].get("ledgers"),
            }
    return result


def worked(out: Path, job: Job, parts: int | None = None) -> bool:
    """Whether an engine has done all of its work, or so many parts of it."""
    path = out / f"{job.name}.json"
    return path.exists() and len(json.loads(path.read_text())["work"]) >= (parts or len(job.work))


def until(condition: Any, watch: Watch, engines: Fleet, job: Job, limit_s: float = 150.0) -> None:
    start = time.monotonic()
    while not condition():
        watch.tick()
        if not engines.alive(job) or time.monotonic() - start > limit_s:
            engines.end()
            raise SystemExit(f"{job.name} did not come so far: see {engines.folder}/{job.name}.log")
        time.sleep(0.02)


def pause(seconds: float, watch: Watch) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        watch.tick()
        time.sleep(0.02)


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        f"{'':12} {'seconds':>8} {'tokens/s':>9} {'TPOT p99':>9} {'peak GiB':>9} {'preempted':>9}"
    ]
    for one in results:
        for name, burst in one["bursts"].items():
            lines.append(
                f"{name:12} {burst['seconds']:8.2f} {burst['tokens_per_s']:9.0f} "
                f"{burst['tpot_p99_ms']:6.1f} ms {burst['peak_gib']:9.1f} "
                f"{burst['preemptions']:9.0f}"
            )
    lines.append(f"{'idle, GiB':12} {'before':>8} {'after':>9} {'nothing':>9}")
    lines += [
        f"{one['set_up']:12} {one['idle_before_gib']:8.1f} {one['idle_after_gib']:9.1f} "
        f"{one['baseline_gib']:9.1f}"
        for one in results
    ]
    return "\n".join(lines)


def main() -> int:
    parser = fleet.parser(__doc__, limit_s=480.0)
    parser.add_argument("--runner", choices=("V1", "V2"), default="V2")
    parser.add_argument(
        "--set-ups", default="alone,halves,shared", help="also halves-both, shared-both"
    )
    parser.add_argument(
        "--kv-gib", type=float, help="KV memory of both together, to compare as on a smaller GPU"
    )
    options = parser.parse_args()
    out = options.out
    model = fleet.make_model(out / "models", options.shape)
    fleet.preload()
    gpu = nvml.Gpu(fleet.gpu_uuid())
    engines = Fleet(out, options.limit)
    results = []
    kv_bytes = None if options.kv_gib is None else int(options.kv_gib * GIB) // PAIR_OF_PAGES
    kv_bytes = None if kv_bytes is None else kv_bytes * PAIR_OF_PAGES
    for set_up in set_ups(model, out, options.runner, kv_bytes):
        if set_up.name in options.set_ups.split(","):
            results.append(play(set_up, engines, gpu))
            (out / "sharing.json").write_text(json.dumps(results, indent=1))
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
