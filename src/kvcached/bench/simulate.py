"""``kvcached bench simulate``: how many GPUs a fleet of models needs, elastic and static.

Many models with intermittent peaks share some GPUs; every model stays where it is placed. Time,
engines and GPUs are simulated (``bench.sim_engine``), who may have memory is decided by the policy
of the real ledger (``kvcached.policy``). For each number of GPUs the same requests are played with
one KV budget a GPU, with equal fixed parts, and with fixed parts in proportion to each model's mean
load, and with one model awake at a time. What a side needs is the smallest number with which enough
requests meet their SLO.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kvcached.bench.share_load import Arrival, read_trace
from kvcached.bench.sim_engine import Engine, Request, play
from kvcached.bench.sim_fleet import Model, Popularity, least_kv_bytes, make_models, place
from kvcached.bench.sim_memory import Elastic, Memory, Static
from kvcached.bench.sim_shapes import Device
from kvcached.bench.sim_swap import OneAwake, play_in_turns
from kvcached.demo.percentiles import percentile

SIDES = {"elastic": "one budget", "even": "equal parts", "load": "parts by load"}
SWAP = "swap"
"""One model awake at a time, which has all memory."""
HEADROOM = 0.05
DRAIN_S = 120.0


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request should get, and how many of them should."""

    ttft_s: float = 1.0
    tpot_s: float = 0.1
    part: float = 0.99

    def met(self, request: Request) -> bool:
        ttft, tpot = request.ttft_s, request.tpot_s
        return (
            request.end_s is not None
            and ttft is not None
            and ttft <= self.ttft_s
            and (tpot is None or tpot <= self.tpot_s)
        )


@dataclass(slots=True)
class Fleet:
    """All models and their requests; plays them on a number of GPUs."""

    models: Sequence[Model]
    seconds: float
    slo: Slo
    device: Device = field(default_factory=Device)

    def least_gpus(self) -> int:
        """The smallest number on which all models can be placed."""
        gpus = 1
        while place(self.models, gpus, self.device, HEADROOM) is None:
            gpus += 1
        return gpus

    def play(self, gpus: int, side: str) -> dict[str, Any]:
        """One run. Raises ValueError where the models do not fit."""
        places = place(self.models, gpus, self.device, HEADROOM)
        if places is None:
            raise ValueError(f"{len(self.models)} models do not fit on {gpus} GPUs")
        requests: list[Request] = []
        for models in places:
            engines = self._play_one(models, side)
            requests += [request for engine in engines for request in engine.requests]
        return {"gpus": gpus, "side": side, **self._figures(requests)}

    def _play_one(self, models: Sequence[Model], side: str) -> list[Engine]:
        """One GPU."""
        shapes = [model.shape for model in models]
        most = round(self.device.memory_bytes * (1 - HEADROOM))
        swap = OneAwake([most - shape.fixed_bytes for shape in shapes])
        memory = swap if side == SWAP else self._memory(models, side)
        engines = [
            Engine(model.shape, self.device, memory, index, model.fresh())
            for index, model in enumerate(models)
        ]
        until_s = self.seconds + DRAIN_S
        if not engines:
            return engines
        if side == SWAP:
            play_in_turns(engines, shapes, swap, until_s)
        else:
            play(engines, until_s)
        return engines

    def _memory(self, models: Sequence[Model], side: str) -> Memory:
        fixed = sum(model.shape.fixed_bytes for model in models)
        kv_bytes = round(self.device.memory_bytes * (1 - HEADROOM)) - fixed
        if side == "elastic":
            return Elastic(kv_bytes, [model.shape.page_bytes for model in models])
        least = [least_kv_bytes(model.shape) for model in models]
        if side == "even":
            return Static(even_parts(kv_bytes, least))
        weights = [model.rate * model.shape.token_bytes for model in models]
        spare, total = kv_bytes - sum(least), sum(weights) or 1.0
        return Static([low + int(spare * w / total) for low, w in zip(least, weights, strict=True)])

    def _figures(self, requests: Sequence[Request]) -> dict[str, Any]:
        met = sum(self.slo.met(request) for request in requests)
        ttft = sorted(r.ttft_s for r in requests if r.ttft_s is not None)
        tpot = sorted(r.tpot_s for r in requests if r.tpot_s is not None)
        return {
            "requests": len(requests),
            "unfinished": sum(request.end_s is None for request in requests),
            "preempted": sum(request.preempted for request in requests),
            "slo": round(met / max(1, len(requests)), 5),
            "ttft_mean_s": round(sum(ttft) / max(1, len(ttft)), 4),
            "ttft_p99_s": rounded(ttft, 99),
            "tpot_p99_s": rounded(tpot, 99),
        }


def even_parts(total: int, least: Sequence[int]) -> list[int]:
    """The same for everybody, but for nobody less than what one long request needs."""
    parts = list(least)
    low, high = 0, total
    while low < high:  # the highest level that fits
        level = (low + high + 1) // 2
        if sum(max(level, part) for part in least) <= total:
            low = level
        else:
            high = level - 1
    return [max(low, part) for part in parts]


def rounded(values: Sequence[float], percent: float) -> float | None:
    """The percentile; None where there are no values."""
    return round(percentile(values, percent), 5) if values else None


def needed(runs: Sequence[dict[str, Any]], side: str, part: float) -> int | None:
    """The smallest number of GPUs from which on a side meets its SLO at every larger one, too."""
    found = None
    for run in sorted((r for r in runs if r["side"] == side), key=lambda r: -r["gpus"]):
        if run["slo"] < part:
            break
        found = run["gpus"]
    return found


def sweep(
    fleet: Fleet, most_gpus: int, progress: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """Every number of GPUs from the smallest on, until all sides that keep their models loaded meet
    the SLO, or ``most_gpus``.
    """
    runs: list[dict[str, Any]] = []
    for gpus in range(fleet.least_gpus(), most_gpus + 1):
        for side in (SWAP, *SIDES):
            runs.append(fleet.play(gpus, side))
            words = SIDES.get(side, "one awake at a time")
            progress(f"{gpus} GPUs, {words}: {runs[-1]['slo']:.2%} meet the SLO")
        if all(run["slo"] >= fleet.slo.part for run in runs[-len(SIDES) :]):
            break
    return runs


def run(
    models: int,
    mix: Sequence[str],
    *,
    minutes: float,
    most_gpus: int,
    popularity: Popularity,
    slo: Slo,
    seed: int = 1,
    trace: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """The whole sweep. ``trace``: the bundled slice where it is None."""
    rows: Sequence[Arrival] = read_trace(trace)
    seconds = 60 * minutes
    made = make_models(models, mix, popularity, rows, seconds=seconds, seed=seed)
    fleet = Fleet(made, seconds, slo)
    runs = sweep(fleet, most_gpus, progress)
    return {
        "benchmark": "simulate",
        "trace": trace.name if trace is not None else "bundled slice",
        "models": models,
        "mix": list(mix),
        "minutes": minutes,
        "seed": seed,
        "requests": sum(len(model.requests) for model in made),
        "popularity": asdict(popularity),
        "slo": asdict(slo),
        "device": asdict(fleet.device),
        "least_gpus_by_weights": fleet.least_gpus(),
        "needed": {side: needed(runs, side, slo.part) for side in (*SIDES, SWAP)},
        "runs": runs,
    }
