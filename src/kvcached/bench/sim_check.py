"""The simulated fleet beside a real run of ``benchmarks/gpu/multi_llm.py``: the same requests.

A simulation that is far from what engines really did says nothing about a hundred of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvcached.bench.sim_engine import Engine, Request, play
from kvcached.bench.sim_memory import Elastic, Memory, Static
from kvcached.bench.sim_shapes import SHAPES, Device
from kvcached.bench.simulate import Slo, rounded
from kvcached.errors import ConfigError


def check(path: Path) -> dict[str, Any]:
    """Real and simulated figures of each load point and side. Raises ConfigError where the file is
    no result of that benchmark, or one of models that are not simulated.
    """
    try:
        real = json.loads(path.read_text())
        slo = Slo(real["slo"]["ttft_s"], real["slo"]["tpot_s"])
        rows = [
            _row(real, side, point, figures, slo)
            for side, told in real["sides"].items()
            for point, figures in told["points"].items()
        ]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: not a result of multi_llm.py: {error!r}") from error
    return {"run": path.name, "machine": real["machine"], "date": real["date"], "rows": rows}


def _row(
    real: Mapping[str, Any], side: str, point: str, figures: Mapping[str, Any], slo: Slo
) -> dict[str, Any]:
    load = real["plan"]["points"][point]
    limit_s = load["span_s"] + real["plan"]["give_up_s"]
    ended = simulate(real["shapes"], real["kv_bytes"], side, load["models"], limit_s)
    ttft = sorted(r.ttft_s for r in ended if r.end_s is not None and r.ttft_s is not None)
    tpot = sorted(r.tpot_s for r in ended if r.tpot_s is not None)
    seen = figures["all"]
    return {
        "point": point,
        "side": side,
        "real": {
            "ttft_mean_s": seen["ttft_s"].get("mean"),
            "ttft_p99_s": seen["ttft_s"].get("p99"),
            "tpot_p50_s": seen["tpot_s"].get("p50"),
            "slo": seen["slo"],
            "preempted": sum(figures["preemptions"]),
        },
        "simulated": {
            "ttft_mean_s": sum(ttft) / len(ttft) if ttft else None,
            "ttft_p99_s": rounded(ttft, 99),
            "tpot_p50_s": rounded(tpot, 50),
            "slo": sum(slo.met(request) for request in ended) / max(1, len(ended)),
            "preempted": sum(request.preempted for request in ended),
        },
    }


def simulate(
    shapes: Sequence[str],
    kv_bytes: int,
    side: str,
    models: Sequence[Sequence[Sequence[float]]],
    limit_s: float,
    device: Device | None = None,
) -> list[Request]:
    """Plays each model's [seconds, prompt, answer] on one GPU; all requests, as they ended."""
    device = device or Device()
    kinds = [SHAPES[name] for name in shapes]
    memory: Memory
    if side == "elastic":
        memory = Elastic(kv_bytes, [kind.page_bytes for kind in kinds])
    else:
        memory = Static([kv_bytes // len(kinds)] * len(kinds))
    engines = [
        Engine(kind, device, memory, index, [Request(a, int(p), int(o)) for a, p, o in asks])
        for index, (kind, asks) in enumerate(zip(kinds, models, strict=True))
    ]
    play(engines, limit_s)
    return [request for engine in engines for request in engine.requests]
