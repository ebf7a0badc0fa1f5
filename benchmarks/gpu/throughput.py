#!/usr/bin/env python3
"""What kvcached costs: one engine alone on the GPU, plain and elastic in turns.

200 requests of 1024 tokens in and 512 out, sent at once. The engines take turns, each in a process
of its own with the GPU to itself, and the order within a pair changes: a machine that drifts does
so for both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import fleet
from engine import GIB, Job
from fleet import Fleet


def jobs(model: str, ledger: str, runner: str, pairs: int) -> list[Job]:
    def job(kind: str, number: int) -> Job:
        return Job(
            name=f"{runner.lower()}-{kind}-{number}",
            model=model,
            work=("throughput",),
            elastic=kind == "kvcached",
            ledger=ledger,
            runner=runner,
            max_seqs=256,
            kv_bytes=None,
            utilization=0.9,
            sharpen=False,
        )

    order = ("plain", "kvcached")
    return [job(kind, n) for n in range(pairs) for kind in (order if n % 2 == 0 else order[::-1])]


def summary(results: dict[str, dict[str, Any]], runner: str) -> dict[str, Any]:
    """Medians over the runs of each kind; the ratio is that of the medians."""
    kinds: dict[str, Any] = {}
    for kind in ("plain", "kvcached"):
        runs = [
            result
            for name, result in results.items()
            if name.startswith(f"{runner.lower()}-{kind}-") and result.get("ok")
        ]
        if not runs:
            return {"runner": runner, "problem": f"no run of {kind} finished"}
        works = [run["work"]["throughput"] for run in runs]
        kinds[kind] = {
            "runs": len(runs),
            "tokens_per_s": [round(work["output_tokens_per_s"], 1) for work in works],
            "median_tokens_per_s": statistics.median(w["output_tokens_per_s"] for w in works),
            "tpot_p50_ms": 1e3 * statistics.median(work["tpot_p50_s"] for work in works),
            "tpot_p99_ms": 1e3 * statistics.median(work["tpot_p99_s"] for work in works),
            "ttft_p99_s": statistics.median(work["ttft_p99_s"] for work in works),
            "used_idle_gib": statistics.median(run["used_idle_bytes"] for run in runs) / GIB,
            "used_end_gib": statistics.median(run["used_end_bytes"] for run in runs) / GIB,
            "preemptions": [run["preemptions"] for run in runs],
        }
    plain, elastic = kinds["plain"], kinds["kvcached"]
    ratio = elastic["median_tokens_per_s"] / plain["median_tokens_per_s"]
    return {"runner": runner, "kvcached_of_plain": ratio, **kinds}


def table(summaries: list[dict[str, Any]]) -> str:
    lines = [
        f"{'':13} {'tokens/s':>9} {'TPOT p50':>9} {'p99':>8} {'TTFT p99':>9} "
        f"{'GiB idle':>8} {'after':>6}"
    ]
    for one in summaries:
        if "problem" in one:
            lines.append(f"{one['runner']}: {one['problem']}")
            continue
        for kind in ("plain", "kvcached"):
            row = one[kind]
            lines.append(
                f"{one['runner']} {kind:10} {row['median_tokens_per_s']:9.0f} "
                f"{row['tpot_p50_ms']:6.1f} ms {row['tpot_p99_ms']:5.1f} ms "
                f"{row['ttft_p99_s']:7.2f} s {row['used_idle_gib']:8.1f} {row['used_end_gib']:6.1f}"
            )
        lines.append(
            f"{one['runner']} kvcached has {one['kvcached_of_plain']:.4f} of plain's speed"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results and logs")
    parser.add_argument("--shape", choices=sorted(fleet.SHAPES), default="8b")
    parser.add_argument("--runners", default="V2")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=420.0, help="seconds in all")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    out = options.out.resolve()
    model = fleet.make_model(out / "models", options.shape)
    fleet.preload()
    engines = Fleet(out, options.limit)
    summaries = []
    for runner in options.runners.split(","):
        engines.run_all(jobs(model, str(out / "ledger"), runner, options.pairs), 1)
        summaries.append(summary(engines.results, runner))
    (out / "throughput.json").write_text(json.dumps(summaries, indent=1))
    print(table(summaries))
    return 0 if not any("problem" in one for one in summaries) else 1


if __name__ == "__main__":
    sys.exit(main())
