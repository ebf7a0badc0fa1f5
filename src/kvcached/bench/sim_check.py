"""The simulated fleet beside a real run of ``benchmarks/gpu/multi_llm.py``: the same requests.

A simulation that is far from what engines really did says nothing about a hundred of them. How
fast the machine is may be fitted to the static side alone; the elastic side, which is what the
simulation is for, is then foretold.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from kvcached.bench.sim_engine import Engine, Request, play
from kvcached.bench.sim_memory import Elastic, Memory, Static
from kvcached.bench.sim_shapes import H200, SHAPES, TINY, Device
from kvcached.bench.sim_swap import OneAwake, play_in_turns
from kvcached.bench.simulate import Slo
from kvcached.demo.percentiles import percentile
from kvcached.errors import ConfigError

FACTOR, LEAST_S, SLO_PART = 1.5, 0.1, 0.1
"""A mean time to the first token agrees within this factor, or so many seconds; the part of
requests that meet their SLO, within this.
"""
FITTED = ("step_overhead_s", "request_overhead_s", "bandwidth", "compute")
"""A cost that is 0 stays 0."""
SIDES = ("static", "elastic", "swap")
FIT_TO = ("ttft_mean_s", "ttft_p50_s", "tpot_mean_s", "tpot_p50_s")
FIT_STEPS = (2.0, 1.4, 1.15, 1.05)
_START_HOST = Device(bandwidth=1e10, compute=1e11, step_overhead_s=0.005, request_overhead_s=2e-4)


def check(path: Path, fit: bool = False) -> dict[str, Any]:
    """Real and simulated figures of each load point and side, and whether they agree. With ``fit``
    the device's speed is what suits the static side best. Raises ConfigError where the file is no
    result of that benchmark, or one of models that are not simulated.
    """
    try:
        real = json.loads(path.read_text())
        device = device_of(real)
        if fit:
            device = fitted(real, device)
        slo = Slo(real["slo"]["ttft_s"], real["slo"]["tpot_s"])
        points = {name: load for name, load in real["plan"]["points"].items() if name != "warm-up"}
        left_out = [name for name, load in points.items() if "prefixes" in load]
        rows = [
            _row(real, side, point, device, slo)
            for point in points
            for side, told in real["sides"].items()
            if point in told["points"] and point not in left_out and side in SIDES
        ]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: not a result of multi_llm.py: {error!r}") from error
    return {
        "run": path.name,
        "machine": real["machine"],
        "date": real["date"],
        "device": asdict(device),
        "fitted_to": "static" if fit else None,
        "left_out": left_out,  # contents of prompts are not simulated
        "rows": rows,
        "ratios": _ratios(rows),
        "agrees": bool(rows) and all(row["agrees"] for row in rows),
    }


def device_of(real: Mapping[str, Any]) -> Device:
    """What is known of the machine without looking at the figures."""
    if real.get("device", "").startswith("host:"):
        return replace(_START_HOST, at_once=real.get("cpus", 1))
    return H200 if "H200" in real["machine"] else Device()


def _row(
    real: Mapping[str, Any], side: str, point: str, device: Device, slo: Slo
) -> dict[str, Any]:
    figures = real["sides"][side]["points"][point]
    seen = figures["all"]
    ours = figures_of(_again(real, side, point, device), slo)
    theirs = {
        **{f"{key}_{one}_s": seen[f"{key}_s"].get(one) for key, one in _TIMES},
        "slo": seen["slo"],
        "preempted": sum(figures["preemptions"]),
    }
    return {
        "point": point,
        "side": side,
        "real": theirs,
        "simulated": ours,
        "agrees": _near(theirs["ttft_mean_s"], ours["ttft_mean_s"])
        and abs(theirs["slo"] - ours["slo"]) <= SLO_PART,
    }


_TIMES = (("ttft", "mean"), ("ttft", "p50"), ("ttft", "p99"), ("tpot", "mean"), ("tpot", "p50"))


def figures_of(requests: Sequence[Request], slo: Slo) -> dict[str, Any]:
    """The figures of simulated requests, as ``multi_llm.py`` has them: latencies are those of the
    ones that ended.
    """
    ended = [request for request in requests if request.end_s is not None]
    values = {
        "ttft": [r.ttft_s for r in ended if r.ttft_s is not None],
        "tpot": [r.tpot_s for r in ended if r.tpot_s is not None],
    }
    return {
        **{f"{key}_{one}_s": _figure(values[key], one) for key, one in _TIMES},
        "slo": sum(slo.met(request) for request in requests) / max(1, len(requests)),
        "preempted": sum(request.preempted for request in requests),
    }


def _figure(values: Sequence[float], one: str) -> float | None:
    if not values:
        return None
    return sum(values) / len(values) if one == "mean" else percentile(values, float(one[1:]))


def _near(real: float | None, simulated: float | None) -> bool:
    if real is None or simulated is None:
        return real is simulated
    low, high = sorted((real, simulated))
    return high <= FACTOR * low or high - low <= LEAST_S


def _ratios(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Static over elastic by load point: what users would read off the simulation."""
    by_name = {(row["point"], row["side"]): row for row in rows}
    found = []
    for point in dict.fromkeys(row["point"] for row in rows):
        sides = [by_name.get((point, side)) for side in ("static", "elastic")]
        if None not in sides:
            static, elastic = sides
            assert static is not None and elastic is not None
            found.append(
                {"point": point}
                | {
                    whose: static[whose]["ttft_mean_s"] / elastic[whose]["ttft_mean_s"]
                    for whose in ("real", "simulated")
                    if static[whose]["ttft_mean_s"] and elastic[whose]["ttft_mean_s"]
                }
            )
    return found


def fitted(real: Mapping[str, Any], start: Device) -> Device:
    """The device with which the simulation is nearest to the static side's figures: each constant
    in turn is made larger or smaller as long as that helps, in smaller and smaller steps.
    """
    points = [name for name in real["sides"]["static"]["points"] if name in real["plan"]["points"]]
    points = [name for name in points if "prefixes" not in real["plan"]["points"][name]]
    slo = Slo(real["slo"]["ttft_s"], real["slo"]["tpot_s"])

    def error(device: Device) -> float:
        total = 0.0
        for point in points:
            ours = figures_of(_again(real, "static", point, device), slo)
            seen = real["sides"]["static"]["points"][point]["all"]
            for key in FIT_TO:
                theirs = seen[f"{key[:4]}_s"].get(key.split("_")[1])
                if theirs and ours[key]:
                    total += math.log(ours[key] / theirs) ** 2
        return total

    return _descend(start, error)


def _descend(device: Device, error: Callable[[Device], float]) -> Device:
    best = error(device)
    for step in FIT_STEPS:
        better = True
        while better:
            better = False
            for name in FITTED:
                for factor in (step, 1 / step):
                    other = replace(device, **{name: getattr(device, name) * factor})
                    if (found := error(other)) < best * 0.999:
                        device, best, better = other, found, True
                        break
    return device


def _again(real: Mapping[str, Any], side: str, point: str, device: Device) -> list[Request]:
    load = real["plan"]["points"][point]
    return simulate(
        real["shapes"],
        real["kv_bytes"],
        side,
        load["models"],
        load["span_s"] + real["plan"]["give_up_s"],
        device,
        caching=real.get("options", {}).get("prefix_caching") == "True",
    )


def simulate(
    shapes: Sequence[str],
    kv_bytes: int,
    side: str,
    models: Sequence[Sequence[Sequence[float]]],
    limit_s: float,
    device: Device | None = None,
    caching: bool = False,
) -> list[Request]:
    """Plays each model's [seconds, prompt, answer] on one GPU; all requests, as they ended.
    ``caching``: what they leave stays until it is needed.
    """
    device = device or Device()
    kinds = [TINY if name == TINY.name else SHAPES[name] for name in shapes]
    memory: Memory
    if side == "swap":
        weights = sum(kind.weight_bytes for kind in kinds)
        memory = OneAwake([kv_bytes + weights - kind.weight_bytes for kind in kinds])
    elif side == "elastic":
        memory = Elastic(kv_bytes, [kind.page_bytes for kind in kinds], caching)
    else:
        memory = Static([kv_bytes // len(kinds)] * len(kinds))
    engines = [
        Engine(kind, device, memory, index, [Request(a, int(p), int(o)) for a, p, o in asks])
        for index, (kind, asks) in enumerate(zip(kinds, models, strict=True))
    ]
    if isinstance(memory, OneAwake):
        play_in_turns(engines, kinds, memory, limit_s)
    else:
        play(engines, limit_s, device.at_once)
    return [request for engine in engines for request in engine.requests]
