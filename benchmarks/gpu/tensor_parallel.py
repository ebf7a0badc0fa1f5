#!/usr/bin/env python3
"""Engines with two ranks, each on a GPU of its own: is it right, and what does it cost?

Parts, in the order in which they run (``--parts``):

- equal: an engine with kvcached gives the token ids that a plain one gives; a control that loses
  its KV cache does not
- short: two engines share both GPUs while another program fills the second one until there is room
  for a fraction of their KV caches; both answer, and a plain engine judges their answers
- costs: a page in and out on one GPU and on both at the same time; a lease on one and on two
- kills: engines by the dozen, one rank of each killed at a random moment
- speed: plain and elastic in turns, 200 requests of 1024 tokens in and 512 out
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import equality
import fleet
import rank_kills
from engine import GIB, Job
from fleet import Fleet
from sharing import Watch, pause, until, worked

from kvcached import nvml
from kvcached.group import AccountGroup
from kvcached.ledger import Account, Ledger

PAGE_BYTES = 32 << 20
LEFT_BYTES = 3 * GIB // 8  # what the other program leaves of the second GPU for KV caches
RANKS = 2
Part = Callable[[Fleet, argparse.Namespace], dict[str, Any]]


def base(model: str, out: Path, name: str, *work: str, **changes: Any) -> Job:
    values: dict[str, Any] = {"max_tokens_a_step": 2048, "ledger": str(out / "ledger")} | changes
    return Job(name=name, model=model, work=work, ranks=RANKS, **values)


def equal(engines: Fleet, options: argparse.Namespace) -> dict[str, Any]:
    model, out = options.model, options.out
    case = equality.case(base(model, out, "tp", "churn", "stop", "abort"), control="all")
    engines.run_all(case.jobs[:1], 1)  # alone: it compiles what the others then find
    engines.run_all(case.jobs[1:], 2)
    verdict = equality.judge(case, engines.results)
    print(equality.table([verdict]), flush=True)
    return verdict


# --- short of memory


def _fill(gpu: int, leave_bytes: int, filled: Any, end: Any) -> None:
    import torch

    torch.empty(1, device=f"cuda:{gpu}")  # a context takes half a gigabyte of its own
    used, total = nvml.Gpu(fleet.gpu_uuid(gpu)).memory()
    memory = torch.empty(total - used - leave_bytes, dtype=torch.int8, device=f"cuda:{gpu}")
    filled.set()
    end.wait()
    del memory


@contextmanager
def another_program(gpu: int, leave_bytes: int) -> Iterator[None]:
    """Holds all memory of a GPU but so much, known to nobody's ledger, while the block runs."""
    fork = multiprocessing.get_context("fork")
    filled, end = fork.Event(), fork.Event()
    process = fork.Process(target=_fill, args=(gpu, leave_bytes, filled, end))
    process.start()
    try:
        if not filled.wait(60):
            raise SystemExit(f"the other program did not get all but {leave_bytes} bytes")
        yield
    finally:
        end.set()
        process.join()


def short(engines: Fleet, options: argparse.Namespace) -> dict[str, Any]:
    # Of the 1B shape: with sharpened weights 32 layers amplify every rounding. Engines that are
    # short of memory have other batches, so a judge says how likely their tokens are; vLLM's
    # batch-invariant kernels round less differently, and the judge sees more (not all: its tokens
    # still depend on the batch a little).
    out = options.out
    model = fleet.make_model(out / "models", "1b")
    same = {"batch_invariant": True}
    plain_job = base(model, out, "short-plain", "stop", "churn", **same)
    control = replace(plain_job, name="short-control", loses="all")
    engines.run_all([plain_job, control], 2)
    uuids = [fleet.gpu_uuid(rank) for rank in range(RANKS)]
    gpus = [nvml.Gpu(uuid) for uuid in uuids]
    jobs = []
    for which in "ab":
        name = f"short-{which}"
        files = {word: str(out / f"{word}-{name}") for word in ("warm", "start", "end")}
        for path in files.values():
            Path(path).unlink(missing_ok=True)
        jobs.append(
            base(
                model,
                out,
                name,
                "stop",  # so that all that vLLM allocates with its first requests is there
                "forget",
                "churn",
                elastic=True,
                prefix_caching=True,
                **same,
                start_files=(files["warm"], files["warm"], files["start"]),
                hold_file=files["end"],
            )
        )
    watch = Watch(gpus[1])
    for job in jobs:
        engines.start(job)
        Path(job.start_files[0]).touch()
        until(lambda job=job: worked(out, job, 2), watch, engines, job)
    pause(2.0, watch)
    ledgers = [Ledger.open(out / "ledger", uuid, create=False, read_only=True) for uuid in uuids]
    with another_program(1, ledgers[1].headroom + LEFT_BYTES):
        pause(2.5, watch)  # engines measure what others use every second
        start = time.monotonic()
        for job in jobs:
            Path(job.start_files[2]).touch()
        peaks = [0] * RANKS
        while not all(worked(out, job) for job in jobs):
            peaks = [
                max(peak, ledger.snapshot().charge)
                for peak, ledger in zip(peaks, ledgers, strict=True)
            ]
            if not all(engines.alive(job) for job in jobs) or time.monotonic() - start > 120:
                raise SystemExit("two engines that are short of memory died, or hang")
            time.sleep(0.02)
        seconds = time.monotonic() - start
        pause(3.0, watch)
        for job in jobs:
            Path(job.hold_file).touch()
        engines.finish(watch.tick)
    names = ("short-plain", "short-control", *(job.name for job in jobs))
    judge = base(model, out, "short-judge", "verdict", judges=names, **same)
    engines.run_all([judge], 1)
    told = engines.results.get("short-judge", {}).get("work", {}).get("verdict", {})
    results = [engines.results[job.name] for job in jobs]
    equal = {
        job.name: equality.compare(engines.results["short-plain"], engines.results[job.name])
        for job in jobs
    }
    plain = told.get("short-plain", {})
    return {
        "seconds": seconds,
        "peak_charges_gib": [peak / GIB for peak in peaks],
        "preemptions": [result["preemptions"] for result in results],
        "refused": [[one["refused"] for one in result["ledgers"]] for result in results],
        "reclaimed": [[one["reclaimed"] for one in result["ledgers"]] for result in results],
        "equal": equal,
        "judged": told,
        "ok": bool(told)
        and all(told[job.name]["gap_p99"] <= 1.5 * plain["gap_p99"] for job in jobs)
        and told["short-control"]["gap_p99"] > 4 * plain["gap_p99"]
        and all(one["stop"]["equal"] == one["stop"]["requests"] for one in equal.values()),
    }


# --- costs


def _pages(gpu: int, start: Any, told: Any) -> None:
    from kvcached.bench.vmm import open_backend, pages

    backend = open_backend(f"cuda:{gpu}")
    start.wait()
    told.put((gpu, pages(backend, PAGE_BYTES, 400)))


def costs(engines: Fleet, options: argparse.Namespace) -> dict[str, Any]:
    fork = multiprocessing.get_context("fork")
    found: dict[str, Any] = {}
    for name, gpus in {"one GPU": (0,), "both GPUs at once": (0, 1)}.items():
        start, told = fork.Event(), fork.SimpleQueue()
        processes = [fork.Process(target=_pages, args=(gpu, start, told)) for gpu in gpus]
        for process in processes:
            process.start()
        time.sleep(4.0)  # contexts are made
        start.set()
        for process in processes:
            process.join(60)
        if any(process.exitcode != 0 for process in processes):
            raise SystemExit(f"pages on {name} were not measured")
        found[name] = sorted((told.get() for _ in gpus), key=lambda pair: pair[0])
    with (
        Ledger.open(options.out / "costs", "host:one", 64 * GIB) as one,
        Ledger.open(options.out / "costs", "host:two", 64 * GIB) as two,
    ):
        accounts = [ledger.join("bench", "bench") for ledger in (one, two)]
        group = AccountGroup(accounts, PAGE_BYTES)
        found["lease_us"] = {"one device": _lease_us(accounts[0]), "two devices": _lease_us(group)}
    return found


def _lease_us(account: Account | AccountGroup) -> float:
    """The median time of a lease of a page and its return."""
    times = []
    for _ in range(3000):
        begin = time.perf_counter_ns()
        assert account.lease(PAGE_BYTES)
        account.give_back(PAGE_BYTES)
        times.append((time.perf_counter_ns() - begin) / 1e3)
    return statistics.median(times)


# --- speed


def speed(engines: Fleet, options: argparse.Namespace) -> dict[str, Any]:
    model, out = options.model, options.out
    plain = base(
        model,
        out,
        "speed-plain-0",
        "throughput",
        max_seqs=256,
        max_tokens_a_step=None,
        kv_bytes=None,
        utilization=0.9,
        sharpen=False,
    )
    ours = replace(plain, name="speed-kvcached-0", elastic=True)
    jobs = [
        plain,
        ours,
        replace(ours, name="speed-kvcached-1"),
        replace(plain, name="speed-plain-1"),
    ]
    engines.run_all(jobs, 1)
    found: dict[str, list[float]] = {"plain": [], "kvcached": []}
    for job in jobs:
        if engines.results.get(job.name, {}).get("ok"):
            work = engines.results[job.name]["work"]["throughput"]
            found[job.name.split("-")[1]].append(work["output_tokens_per_s"])
    return {"output_tokens_per_s": found}


def kills(engines: Fleet, options: argparse.Namespace) -> dict[str, Any]:
    small = fleet.make_model(options.out / "models", "1b")
    return rank_kills.run(engines, small, options.kills, options.kills_s)


PARTS: dict[str, tuple[Part, float]] = {
    "equal": (equal, 100.0),
    "short": (short, 215.0),
    "costs": (costs, 30.0),
    "kills": (kills, 90.0),
    "speed": (speed, 110.0),
}
"""Each part, and the seconds without which it is not begun."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = fleet.parser(__doc__, limit_s=900.0)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--kills-s", type=float, default=240.0, help="seconds for them at most")
    options = parser.parse_args(arguments)
    options.model = fleet.make_model(options.out / "models", options.shape)
    fleet.preload()
    engines = Fleet(options.out, options.limit)
    results: dict[str, Any] = {}
    for name in options.parts.split(","):
        part, least_s = PARTS[name]
        left = options.limit - (time.monotonic() - fleet.STARTED)
        fleet.say(f"{name}: {left:.0f} s left")
        if left < least_s:
            results[name] = {"problem": "no time left"}
            continue
        try:
            results[name] = part(engines, options)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the edge: other parts still run
            traceback.print_exc()
            engines.end()
            results[name] = {"problem": f"{type(error).__name__}: {error}"}
        (options.out / "tensor_parallel.json").write_text(json.dumps(results, indent=1))
        print(json.dumps(results[name], indent=None)[:1500], flush=True)
        if name == "equal" and "problem" in results[name]:
            break  # nothing that follows would mean anything
    return 0 if not any("problem" in one for one in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
