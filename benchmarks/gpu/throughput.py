#!/usr/bin/env python3
"""What kvcached costs: one engine alone on the GPU, plain and elastic in turns.

200 requests of 1024 tokens in and 512 out, sent at once; with ``--paced`` also 300 requests of 512
in and 128 out that arrive one by one, far below what the GPU can do. The engines take turns, each
in a process of its own with the GPU to itself, and the order of a round changes: a machine that
drifts does so for all. ``--kinds`` adds engines that tell where the cost comes from.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fleet
from engine import GIB, Job
from fleet import Fleet

from kvcached.bench import pictures

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "kvcached": {"elastic": True},
    "block": {"elastic": True, "layout": "block"},  # all layers of a block together
    # All pages are mapped before the work and stay: what is left is the layout's cost.
    "mapped": {"elastic": True, "layout": "block", "warm_pages": 1400},
    "layers": {"elastic": True, "layout": "layer", "warm_pages": 700},  # mapped as well
    "warm": {"elastic": True, "warm_pages": 64},  # the first step of a burst maps nothing
    "pages64": {"elastic": True, "page_mib": 64},
    "pages128": {"elastic": True, "page_mib": 128},
}


MAIN = "throughput"
CONTEXTS = ("short", "short-again", "sustained", "long")
SPEEDS = ("pairs", *CONTEXTS)  # works that have a ratio of tokens a second


def jobs(
    model: str,
    ledger: str,
    runner: str,
    kinds: Sequence[str],
    rounds: int,
    work: tuple[str, ...],
    prefix_caching: bool = False,
) -> list[Job]:
    def job(kind: str, number: int) -> Job:
        return Job(
            name=f"{runner.lower()}-{kind}-{number}",
            model=model,
            work=work,
            ledger=ledger,
            runner=runner,
            max_seqs=256,
            kv_bytes=None,
            utilization=0.9,
            sharpen=False,
            prefix_caching=prefix_caching,
            **KINDS[kind],
        )

    return [
        job(kind, number)
        for number in range(rounds)
        for kind in (kinds if number % 2 == 0 else kinds[::-1])
    ]


def summary(
    results: dict[str, dict[str, Any]], runner: str, kinds: Sequence[str]
) -> dict[str, Any]:
    """Medians over the runs of each kind; ratios are those of the medians."""
    found: dict[str, Any] = {}
    for kind in kinds:
        runs = [
            result
            for name, result in results.items()
            if name.startswith(f"{runner.lower()}-{kind}-") and result.get("ok")
        ]
        if not runs:
            return {"runner": runner, "problem": f"no run of {kind} finished"}
        found[kind] = _figures(runs)
    plain = found.get("plain", {})
    for one in found.values() if plain else ():
        one["speed_of_plain"] = one["median_tokens_per_s"] / plain["median_tokens_per_s"]
        if plain["first"] == MAIN:
            one["pairs_of_plain"] = paired(one["tokens_per_s"], plain["tokens_per_s"])
        for name in CONTEXTS:
            key = f"{name}_tokens_per_s"
            if key in plain:
                one[f"{name}_of_plain"] = paired(one[key], plain[key])
        if "paced_tpot_p99_ms" in plain:
            one["paced_tpot_p99_of_plain"] = paired(
                one["paced_tpot_p99_ms"], plain["paced_tpot_p99_ms"]
            )
    return {"runner": runner, "kinds": found}


def paired(ours: Sequence[float], plain: Sequence[float]) -> dict[str, float]:
    """The median of the rounds' ratios, and their spread; runs are in the order of the rounds."""
    ratios = [a / b for a, b in zip(ours, plain, strict=False)]
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def _figures(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = next(name for name in (MAIN, *CONTEXTS, "paced") if name in runs[0]["work"])
    works = [run["work"][first] for run in runs]
    paced = [run["work"]["paced"] for run in runs if "paced" in run["work"]]
    told = {
        "first": first,  # the work whose figures follow; the others' are below
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
    for name in CONTEXTS:
        if all(name in run["work"] for run in runs):
            speeds = [run["work"][name]["output_tokens_per_s"] for run in runs]
            told[f"{name}_tokens_per_s"] = [round(speed, 1) for speed in speeds]
    if paced:
        told |= {
            f"paced_{key}_ms": [1e3 * work[f"{key}_s"] for work in paced]
            for key in ("tpot_p50", "tpot_p99", "ttft_p99")
        }
    return told


def table(summaries: list[dict[str, Any]]) -> str:
    lines = [
        f"{'':12} {'runs':>4} {'tokens/s':>8} {'of plain':>8} {'TPOT p50':>9} {'p99':>8} "
        f"{'TTFT p99':>8} {'GiB idle':>8} {'after':>6}"
    ]
    for one in summaries:
        if "problem" in one:
            lines.append(f"{one['runner']}: {one['problem']}")
            continue
        for kind, row in one["kinds"].items():
            lines.append(
                f"{one['runner']} {kind:9} {row['runs']:4} {row['median_tokens_per_s']:8.0f} "
                f"{row.get('speed_of_plain', 0):8.4f} {row['tpot_p50_ms']:6.2f} ms "
                f"{row['tpot_p99_ms']:5.2f} ms {row['ttft_p99_s']:6.2f} s "
                f"{row['used_idle_gib']:8.1f} {row['used_end_gib']:6.1f}"
            )
            for name in SPEEDS:
                if f"{name}_of_plain" in row:
                    ratio = row[f"{name}_of_plain"]
                    lines.append(
                        f"   {name}: {ratio['median']:.4f} of plain's tokens/s "
                        f"({ratio['least']:.4f} to {ratio['most']:.4f})"
                    )
            if "paced_tpot_p99_of_plain" in row:
                times = ", ".join(f"{ms:.2f}" for ms in row["paced_tpot_p99_ms"])
                ratio = row["paced_tpot_p99_of_plain"]
                lines.append(
                    f"   paced: TPOT p99 {times} ms, {ratio['median']:.4f} of plain's "
                    f"({ratio['least']:.4f} to {ratio['most']:.4f})"
                )
    return "\n".join(lines)


def main() -> int:
    parser = fleet.parser(__doc__, limit_s=420.0)
    parser.add_argument("--runners", default="V2")
    parser.add_argument("--kinds", default="plain,kvcached", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--pairs", type=int, default=2, help="rounds of all kinds")
    parser.add_argument("--paced", default="", help="runners that also get paced requests")
    parser.add_argument("--contexts", default="", help=f"more work: {', '.join(CONTEXTS)}")
    parser.add_argument("--contexts-alone", action="store_true", help="no 1024 in and 512 out")
    parser.add_argument("--prefix-caching", action="store_true", help="in all engines")
    parser.add_argument("--machine", default="", help="its name in the results")
    parser.add_argument("--plot", type=Path, help="a PNG to write; needs matplotlib")
    options = parser.parse_args()
    out = options.out
    model = fleet.make_model(out / "models", options.shape)
    fleet.preload()
    engines = Fleet(out, options.limit)
    summaries = []
    for runner in options.runners.split(","):
        paced = ("paced",) if runner in options.paced.split(",") else ()
        contexts = tuple(name for name in CONTEXTS if name in options.contexts.split(","))
        work = (*(() if options.contexts_alone else (MAIN,)), *contexts, *paced)
        kinds = options.kinds.split(",")
        chosen = jobs(
            model, str(out / "ledger"), runner, kinds, options.pairs, work, options.prefix_caching
        )
        engines.run_all(chosen, 1)
        summaries.append(summary(engines.results, runner, kinds))
    told = {
        **fleet.heading("overhead", options.machine),
        "shape": options.shape,
        "prefix_caching": options.prefix_caching,
        "summaries": summaries,
    }
    (out / "throughput.json").write_text(json.dumps(told, indent=1))
    if options.plot is not None:
        pictures.overhead(summaries, SPEEDS, options.plot)
    print(table(summaries))
    return 0 if not any("problem" in one for one in summaries) else 1


if __name__ == "__main__":
    sys.exit(main())
