#!/usr/bin/env python3
"""Several models on one GPU under intermittent peaks: elastic against static partitions, and
against models that have the GPU one at a time.

Three engines are up at once and each has its peak in turn, while the others get a little. Arrivals
have the rhythm and the lengths of a real trace (``arrivals.py``). All sides have the same memory
for KV caches: static gives each engine its part, elastic one ledger to all. The engines of a side
start once and meet every load point, which is the height of the peaks; all sides get the same
requests. The third side, ``swap``, is plain engines that sleep (vLLM's sleep mode: weights in the
host's memory, no KV cache) but for one, which has the others' memory too (``turns.py``). Points
that do not fit into ``--limit`` are skipped, on all sides, and named.

Time to first token counts from when a request was due, not from when a busy engine took it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import arrivals
import fleet
import multi_llm_report as report
import workloads
from arrivals import Lengths, Peaks
from engine import GIB, Job
from fleet import Fleet
from multi_llm_report import Slo
from multi_llm_stage import WARM_UP, Memory, Side, Stage

from kvcached import nvml
from kvcached.bench import pictures
from kvcached.bench.share_load import read_trace

PIECE = 64 << 20  # budgets are whole pages


def kv_bytes(options: argparse.Namespace) -> int:
    """What all models have for their KV caches together: whole pages, also in equal parts."""
    step = PIECE * len(options.shapes)
    return int(options.kv_gib * GIB) // step * step


def make_jobs(side: str, models: list[str], options: argparse.Namespace, out: Path) -> list[Job]:
    total = kv_bytes(options)
    works = (WARM_UP, *(arrivals.point_name(rate) for rate in options.rates))
    elastic = side == "elastic"
    weights = [fleet.weight_bytes(shape) for shape in options.shapes]

    def sizes(index: int) -> dict[str, Any]:
        if elastic:
            return {"kv_bytes": None, "capacity_bytes": total, "headroom": options.headroom}
        if side == "static":
            return {"kv_bytes": total // len(models)}
        asleep = 0 if options.device.startswith("host:") else sum(weights) - weights[index]
        return {
            "kv_bytes": (total + asleep) // PIECE * PIECE,
            "turns": str(out / "turns"),
            "models": len(models),
        }

    def job(index: int, model: str) -> Job:
        name = f"{side}-{index}"
        return Job(
            name=name,
            model=model,
            work=tuple(f"point-{each}" for each in works),
            elastic=elastic,
            ledger=str(out / "ledger"),
            runner="V1" if options.device.startswith("host:") else options.runner,
            prefix_caching=options.prefix_caching,
            max_seqs=256,
            max_tokens_a_step=options.step_tokens,
            sharpen=False,
            ready_file=str(out / f"ready-{name}"),
            start_files=tuple(str(out / f"start-{name}-{i}") for i in range(len(works))),
            hold_file=str(out / f"end-{side}"),
            plan=str(out / "plan.json"),
            model_index=index,
            device=options.device,
            **sizes(index),
        )

    return [job(index, model) for index, model in enumerate(models)]


def make_plan(options: argparse.Namespace) -> dict[str, Any]:
    lengths = Lengths(
        divisor=options.divisor,
        answer_divisor=options.answer_divisor,
        prompt_max=options.prompt_max,
        output_max=options.output_max,
        prompt=options.fixed[0],
        output=options.fixed[1],
    )
    return arrivals.plan(
        options.rates,
        Peaks(len(options.shapes), options.base, 0.0, options.width),
        read_trace(options.trace),
        lengths,
        seed=options.seed,
        vocabulary=min(workloads.HIGH_TOKEN, *map(fleet.vocabulary, options.shapes)),
        give_up_s=options.give_up,
    )


def heading(options: argparse.Namespace, device: str, plan: dict[str, Any]) -> dict[str, Any]:
    """What the figures were measured with."""
    return {
        **fleet.heading("multi_llm", options.machine),
        "device": device,
        "options": {key: str(value) for key, value in vars(options).items()},
        "shapes": options.shapes,
        "kv_bytes": kv_bytes(options),
        "plan": plan,
        "slo": {"ttft_s": options.slo_ttft, "tpot_s": options.slo_tpot},
        "sides": {},
        "comparison": [],
    }


def merge(out: Path, parts: list[Path], plot: Path | None = None) -> int:
    """One report of sides that played at the same time, each on a GPU of its own."""
    told, *others = [json.loads(path.read_text()) for path in parts]
    for other in others:
        if other["plan"] != told["plan"]:
            raise SystemExit(f"{parts}: not the same requests")
        told["sides"] |= other["sides"]
        told["command"] += f"; {other['command']}"
    told["comparison"] = report.comparison(told["sides"])
    out.mkdir(parents=True, exist_ok=True)
    (out / "multi_llm.json").write_text(json.dumps(told))
    if plot is not None:
        pictures.multi_llm(told, plot)
    print(report.table(told))
    return int(any("problem" in side for side in told["sides"].values()))


def main() -> int:
    options = parse()
    if options.merge:
        return merge(options.out, options.merge, options.plot)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / "ledger", ignore_errors=True)  # its high-water mark is of this run
    on_host = options.device.startswith("host:")
    models = [fleet.make_model(out / "models", shape) for shape in options.shapes]
    plan = make_plan(options)
    (out / "plan.json").write_text(json.dumps(plan))
    fleet.preload(on_host)
    device = options.device if on_host else fleet.gpu_uuid()
    gpu = None if on_host else nvml.Gpu(device)
    slo = Slo(options.slo_ttft, options.slo_tpot)
    engines = Fleet(out, options.limit)
    names = report.SIDES if options.first == "static" else report.SIDES[::-1]
    order = [name for name in names if name in options.sides]
    stage = Stage(engines, plan, options.limit, options.in_turn, device, slo, len(order))
    sides: list[Side] = []
    told = heading(options, device, plan)

    def save() -> None:
        told["sides"] = {side.name: side.told for side in sides}
        told["comparison"] = report.comparison(told["sides"])
        (out / "multi_llm.json").write_text(json.dumps(told))

    for name in order:
        sides.append(Side(name, tuple(make_jobs(name, models, options, out)), Memory(gpu)))
        stage.play(sides[-1], sides[0] if len(sides) > 1 else None, save)
    if options.plot is not None:
        pictures.multi_llm(told, options.plot)
    print(report.table(told))
    return int(any("problem" in side.told for side in sides))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results and logs")
    parser.add_argument(
        "--shapes", type=lambda text: text.split(","), default=["8b"] * 3, help="8b,8b,1b"
    )
    parser.add_argument("--kv-gib", type=float, default=21.0, help="KV memory of all together")
    parser.add_argument("--headroom", default="0", help="of the ledger, which is for pages alone")
    parser.add_argument(
        "--rates",
        type=lambda text: [float(each) for each in text.split(",")],
        default=[16.0, 12.0, 24.0, 8.0],
        help="heights of the peaks, requests a second; the first ones are run first",
    )
    parser.add_argument("--base", type=float, default=0.5, help="requests a second besides")
    parser.add_argument("--width", type=float, default=12.0, help="seconds of one model's peak")
    parser.add_argument("--trace", type=Path, help="Azure's CSV or Mooncake's JSON lines")
    parser.add_argument("--divisor", type=float, default=1.0, help="of the trace's lengths")
    parser.add_argument("--answer-divisor", type=float, default=0.0, help="of answers alone")
    parser.add_argument("--prompt-max", type=int, default=3000)
    parser.add_argument("--output-max", type=int, default=1000)
    parser.add_argument(
        "--fixed",
        type=lambda text: tuple(int(each) for each in text.split(",")),
        default=(0, 0),
        help="prompt,answer: tokens of every request, instead of the trace's",
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--give-up", type=float, default=25.0, help="seconds after a point's span")
    parser.add_argument("--slo-ttft", type=float, default=1.0, help="seconds")
    parser.add_argument("--slo-tpot", type=float, default=0.05, help="seconds")
    parser.add_argument("--prefix-caching", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--step-tokens", type=int, default=8192, help="of a step, at most")
    parser.add_argument("--first", choices=("static", "elastic"), default="static")
    parser.add_argument(
        "--sides",
        type=lambda text: text.split(","),
        default=["static", "elastic"],
        help="of static, elastic, swap; one, where the others play on another GPU of the machine",
    )
    parser.add_argument(
        "--merge", type=Path, nargs="+", help="only tell what these results say together"
    )
    parser.add_argument("--in-turn", action="store_true", help="engines start one after the other")
    parser.add_argument("--runner", choices=("V1", "V2"), default="V2")
    parser.add_argument("--device", default="gpu", help="or host:NAME, for the CPU: --shapes tiny")
    parser.add_argument("--plot", type=Path, help="a PNG to write; needs matplotlib")
    parser.add_argument("--machine", default="", help="its name in the results")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds in all")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
