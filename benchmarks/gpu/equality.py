#!/usr/bin/env python3
"""Does an engine with kvcached say what a plain one says?

Each case is an engine of one kind (runner, attention backend, scheduling, prefix caching) that
answers the same requests without and with kvcached; token ids are compared. A control of each kind
loses some of its KV cache on purpose and must answer differently: otherwise equality would mean
nothing. See README.md for what to set up.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import fleet
from engine import GIB, Job
from fleet import Fleet

from kvcached.layout import CUDA_LIMITS

BUSY = ("churn", "stop", "abort")
KV_BYTES = {"1b": 4 * GIB, "8b": 16 * GIB, "tiny": GIB}
"""Of a plain engine: so much that it preempts nothing, and its batches are those of the others."""


@dataclass(frozen=True, slots=True)
class Case:
    """Engines that must agree: ``plain`` and ``elastic``; and one that must not: ``control``."""

    plain: Job
    elastic: Job
    control: Job | None = None
    judge: Job | None = None
    """Where the batches of the two cannot be the same: a plain engine that judges all answers."""

    @property
    def jobs(self) -> tuple[Job, ...]:
        return tuple(job for job in (self.plain, self.elastic, self.control) if job is not None)


def case(base: Job, *, control: str = "", judged: bool = False, **elastic: Any) -> Case:
    name = base.name
    plain = replace(base, name=f"{name}-plain")
    ours = replace(base, name=f"{name}-kvcached", elastic=True, **elastic)
    # Only an engine with kvcached has fences to lose.
    kind = ours if control == "fence" else plain
    other = replace(kind, name=f"{name}-control", loses=control) if control else None
    if not judged:
        return Case(plain, ours, other)
    names = tuple(job.name for job in (plain, ours, other) if job is not None)
    judge = replace(
        plain, name=f"{name}-judge", work=("verdict",), judges=names, own_core=False, runner="V1"
    )
    return Case(plain, ours, other, judge)


def cases(
    shape: str,
    model: str,
    windowed: str,
    ledger: str,
    names: Sequence[str],
    runners: Sequence[str],
) -> Iterator[Case]:
    """The named groups of cases, for each runner. ``windowed`` is a model whose layers see the
    last tokens only.
    """
    for runner in runners:
        base = Job(
            "",
            model,
            BUSY,
            ledger=f"{ledger}/all",
            runner=runner,
            max_tokens_a_step=2048,
            kv_bytes=KV_BYTES[shape],
        )

        def named(name: str, runner: str = runner, base: Job = base, **changes: Any) -> Job:
            return replace(base, name=f"{runner.lower()}-{name}", **changes)

        if "base" in names:
            yield case(named("base"), control="all")
        if "prefix" in names:
            yield case(
                named("prefix", work=("prefix", "churn"), prefix_caching=True), control="page"
            )
        if "sync" in names:
            yield case(named("sync", async_scheduling=False))
        if "triton" in names:
            yield case(named("triton", backend="TRITON_ATTN"))
        if "preempt" in names:
            small = {"capacity_bytes": GIB // 2, "ledger": f"{ledger}/{runner}-small"}
            yield case(named("preempt", work=("churn",)), control="all", judged=True, **small)
        if "core" in names:
            # Requests reach another process when they do: its batches are never the same twice.
            yield case(
                named("core", work=("churn", "stop"), own_core=True), control="all", judged=True
            )
        if "fence" in names:
            # Without warm pages a page goes as soon as its last block is free.
            yield case(
                named("fence", work=("stop", "abort", "churn")), control="fence", warm_pages=0
            )
        if "compiled" in names:
            compilation = {"mode": 3, "cudagraph_mode": "FULL_AND_PIECEWISE"}
            yield case(named("compiled", compilation=compilation, work=("churn", "stop")))
        if "zero" in names:
            yield case(named("zero"), control="all", zero_holes=True)
        if "layer" in names:
            yield case(named("layer"), control="all", layout="layer")
        if "fp8" in names:
            yield case(named("fp8", kv_dtype="fp8"), control="all")
        if "sliding" in names:
            yield case(named("sliding", model=windowed), control="all")
        if "hnd" in names:
            yield case(named("hnd", kv_order="HND"), control="all")
        if "flashinfer" in names:
            yield case(named("flashinfer", backend="FLASHINFER"), control="all")
        if "flashinfer-layer" in names:
            apart = named("flashinfer-layer", backend="FLASHINFER")
            yield case(apart, control="all", layout="layer")
        if "flashinfer-wide" in names:
            wide = named("flashinfer-wide", backend="FLASHINFER", block_tokens=64)
            yield case(wide, control="all")
        if "flashinfer-zero" in names:
            zero = named("flashinfer-zero", backend="FLASHINFER")
            yield case(zero, control="all", zero_holes=True)
        if "ngram" in names and runner == runners[-1]:  # only the V1 runner has this drafter
            lookup = {"prompt_lookup_max": 3, "prompt_lookup_min": 1}
            drafter = {"method": "ngram", "num_speculative_tokens": 4, **lookup}
            yield case(
                replace(base, name="v1-ngram", runner="V1", speculative=drafter), control="all"
            )


def compare(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    """Requests with the same tokens, for each piece of work."""
    compared = {}
    for work in left["work"].keys() & right["work"].keys():
        a, b = left["work"][work]["tokens"], right["work"][work]["tokens"]
        differ = [index for index, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1]]
        compared[work] = {
            "requests": len(a),
            "answered": sum(answer is not None for answer in a),
            "equal": len(a) - len(differ),
            "differ": differ[:20],
        }
    return compared


def judge(case: Case, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The verdict on one case: all of it equal, by engines that were what they should be."""
    plain, elastic = results.get(case.plain.name, {}), results.get(case.elastic.name, {})
    verdict: dict[str, Any] = {"case": case.plain.name.removesuffix("-plain"), "ok": False}
    if not plain.get("ok") or not elastic.get("ok"):
        verdict["problem"] = f"{'kvcached' if plain.get('ok') else 'plain'} did not finish"
        return verdict
    equal = compare(plain, elastic)
    arena = elastic["arena"]
    verdict |= {
        "equal": equal,
        "async": elastic["facts"]["async_scheduling"],
        "scheduler": elastic["facts"]["scheduler"],
        "worker": elastic["facts"]["worker"],
        "runner": elastic["facts"]["runner"],
        "strides": elastic["facts"]["strides"],
        "regions": elastic["facts"]["regions"],
        "page_bytes": elastic["facts"]["page_bytes"],
        "zero_bytes": elastic["facts"]["zero_bytes"],
        "drafted": [plain["drafted"], elastic["drafted"]],
        "accepted": [plain["accepted"], elastic["accepted"]],
        "preemptions": [plain["preemptions"], elastic["preemptions"]],
        "maps": arena.get("maps"),
        "unmaps": arena.get("unmaps"),
        "start_s": [plain["start_s"], elastic["start_s"]],
    }
    if case.judge is None:
        problems = [work for work, one in equal.items() if one["equal"] != one["requests"]]
    else:
        problems = _judged(case, results, verdict)
    if plain["facts"]["async_scheduling"] != elastic["facts"]["async_scheduling"]:
        problems.append("one schedules asynchronously, the other does not")
    if not arena.get("unmaps"):
        problems.append("no page was ever given back")
    apart = case.elastic.layout == "layer" or case.elastic.kv_order == "HND"
    if (elastic["facts"]["regions"] > CUDA_LIMITS.max_runs) != apart:  # groups of layers are few
        problems.append(f"its KV cache lies in {elastic['facts']['regions']} regions")
    if bool(elastic["facts"]["zero_bytes"]) != case.elastic.zero_holes:
        problems.append("its holes are not what they should be")
    if case.elastic.speculative and not elastic["accepted"]:
        problems.append("no drafted token was ever accepted")
    if case.elastic.capacity_bytes is not None and not elastic["preemptions"]:
        problems.append("nothing was preempted")
    if case.control is not None and case.judge is None:
        control = results.get(case.control.name, {})
        if not control.get("ok"):
            verdict["control"] = {"died": 0}
            if case.control.loses != "fence":
                problems.append("the control did not finish")
        else:
            lost = compare(plain, control)
            verdict["control"] = {work: one["equal"] for work, one in lost.items()}
            if all(one["equal"] == one["requests"] for one in lost.values()):
                problems.append("the control lost its KV cache and nobody noticed")
    verdict["ok"] = not problems
    if problems:
        verdict["problem"] = "; ".join(problems)
    return verdict


def _judged(case: Case, results: dict[str, dict[str, Any]], verdict: dict[str, Any]) -> list[str]:
    """Problems by the judge's word; its figures go into the verdict."""
    assert case.judge is not None and case.control is not None
    told = results.get(case.judge.name, {}).get("work", {}).get("verdict")
    if told is None:
        return ["the judge did not finish"]
    plain, ours, control = (told[job.name] for job in case.jobs)
    verdict["judged"] = {"plain": plain, "kvcached": ours, "control": control}
    problems = []
    if ours["gap_p99"] > 1.5 * plain["gap_p99"] or ours["gap_worst"] > 2 * plain["gap_worst"]:
        problems.append("its tokens are less likely than those of the plain engine")
    if control["gap_p99"] < 4 * plain["gap_p99"]:
        problems.append("the control lost its KV cache and the judge did not notice")
    return problems


def table(verdicts: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"{'case':14} {'':4} {'equal to plain':42} {'control':14} {'async':5} {'maps/unmaps':>11}"
        f" {'preempt':>9}"
    ]
    for one in verdicts:
        state = "ok" if one["ok"] else "FAIL"
        if "equal" not in one:
            lines.append(f"{one['case']:14} {state:4} {one['problem']}")
            continue
        equal = " ".join(f"{w} {e['equal']}/{e['requests']}" for w, e in one["equal"].items())
        control = " ".join(f"{w[:5]} {n}" for w, n in one.get("control", {}).items())
        lines.append(
            f"{one['case']:14} {state:4} {equal:42} {control:14} {one['async']!s:5} "
            f"{one['maps']}/{one['unmaps']} {one['preemptions'][0]:.0f}/{one['preemptions'][1]:.0f}"
        )
        lines.append(
            f"    {one['regions']} regions, pages of {one['page_bytes'] >> 20} MiB, zeros of "
            f"{one['zero_bytes'] >> 20} MiB; started in {one['start_s'][0]:.1f}/"
            f"{one['start_s'][1]:.1f} s; drafted {one['drafted'][1]:.0f}, accepted "
            f"{one['accepted'][1]:.0f}"
        )
        for name, told in one.get("judged", {}).items():
            lines.append(
                f"    {name}: {told['likeliest']:.2%} of {told['tokens']} tokens are the "
                f"likeliest; below it p99 {told['gap_p99']:.4f}, worst {told['gap_worst']:.4f}"
            )
        if "problem" in one:
            lines.append(f"    {one['problem']}")
    return "\n".join(lines)


def main() -> int:
    parser = fleet.parser(__doc__, shape="1b", limit_s=420.0)
    parser.add_argument("--runners", default="V2,V1", help="vLLM's model runners")
    parser.add_argument(
        "--cases",
        default="base,prefix",
        help="of base, prefix, sync, triton, preempt, core, fence, compiled, zero, layer, fp8, "
        "sliding, hnd, flashinfer, flashinfer-layer, flashinfer-wide, flashinfer-zero, ngram",
    )
    parser.add_argument("--at-a-time", type=int, default=4, help="engines at a time")
    options = parser.parse_args()
    out = options.out
    model = fleet.make_model(out / "models", options.shape)
    windowed = fleet.make_model(out / "models", options.shape, sliding_window=512)
    names, runners = options.cases.split(","), options.runners.split(",")
    chosen = list(cases(options.shape, model, windowed, str(out / "ledger"), names, runners))
    if not chosen:
        parser.error(f"no case of --cases {options.cases}")
    fleet.preload()
    engines = Fleet(out, options.limit)
    jobs = [job for one in chosen for job in one.jobs]
    engines.run_all(jobs[:1], 1)  # alone: it compiles what the others then find
    engines.run_all(jobs[1:], options.at_a_time)
    engines.run_all([one.judge for one in chosen if one.judge is not None], options.at_a_time)
    verdicts = [judge(one, engines.results) for one in chosen]
    (out / "equality.json").write_text(json.dumps(verdicts, indent=1))
    print(table(verdicts))
    return 0 if all(one["ok"] for one in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
