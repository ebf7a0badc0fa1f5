"""``kvcached bench engine``: the speed of one elastic engine against that of one plain engine.

Both are up the whole time, each with the same budget for itself, and only one of them works at a
time. They take turns within a pair, and the pair's ratio is what counts: a machine that drifts
drifts for both. Every round sends the same requests at once, after the prefix cache was reset.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvcached.demo import setups
from kvcached.demo.figures import tokens_per_s
from kvcached.demo.load import Result, Target, play
from kvcached.demo.models import make_models
from kvcached.demo.servers import EngineProcess, running
from kvcached.demo.setups import Options
from kvcached.demo.trace import Request, at_once, make_load
from kvcached.errors import KvcachedError
from kvcached.processes import session_cpu_s

KINDS = ("elastic", "plain")


class EngineBenchError(KvcachedError):
    """A request of the benchmark failed, so its speed means nothing."""


@dataclass(frozen=True, slots=True)
class Round:
    """One engine answering all requests once."""

    tokens_per_s: float
    cpu_s: float
    """Processor seconds of all processes of the engine."""


def run(
    out: Path, pairs: int, requests: int, budget_bytes: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measures ``pairs`` pairs of rounds. Speeds in generated tokens a second.

    ``say`` is told about progress. Blocks; needs vLLM. Raises KvcachedError when an engine does
    not start or does not answer.
    """
    out.mkdir(parents=True, exist_ok=True)
    options = Options(out=out, budget_bytes=budget_bytes)
    models = dict(zip("AB", make_models(out.parent / "models"), strict=True))
    load = at_once(make_load(options.shape, models), "A", requests)
    alone = {"A": models["A"]}
    specs = [
        replace(setups.elastic(options, alone).specs[0], name="elastic"),
        replace(setups.reference(options, alone).specs[0], name="plain"),
    ]
    with running(specs, say) as engines:
        by_kind = {engine.name: engine for engine in engines}
        for kind in KINDS:
            measure(by_kind[kind], load)  # what is made at the first use must not count
        rounds = [_pair(index, by_kind, load, say) for index in range(pairs)]
    return summary(rounds, len(load), budget_bytes)


def measure(engine: EngineProcess, load: Sequence[Request]) -> Round:
    """One round, its figures by engine. Raises EngineBenchError when a request failed."""
    engine.reset_prefix_cache()
    before_s = session_cpu_s(engine.session)
    results = play(load, {"A": Target(engine.url, engine.spec.model.name)})
    cpu_s = session_cpu_s(engine.session) - before_s
    return Round(_speed(engine.name, results), cpu_s)


def _speed(name: str, results: Sequence[Result]) -> float:
    failed = next((result for result in results if not result.ok), None)
    if failed is not None:
        raise EngineBenchError(f"a request of the {name} engine failed: {failed.error}")
    return tokens_per_s(results)


def _pair(
    index: int,
    engines: Mapping[str, EngineProcess],
    load: Sequence[Request],
    say: Callable[[str], None],
) -> dict[str, Round]:
    order = KINDS if index % 2 else tuple(reversed(KINDS))
    pair = {kind: measure(engines[kind], load) for kind in order}
    speeds = ", ".join(f"{kind} {pair[kind].tokens_per_s:.1f} tokens/s" for kind in KINDS)
    say(f"pair {index + 1}: {speeds}")
    return pair


def summary(rounds: Sequence[Mapping[str, Round]], requests: int, budget: int) -> dict[str, Any]:
    """The report: each pair, its ratio, and the medians over pairs."""
    pairs = [
        {
            "elastic_tokens_per_s": round(pair["elastic"].tokens_per_s, 1),
            "plain_tokens_per_s": round(pair["plain"].tokens_per_s, 1),
            "ratio": round(pair["elastic"].tokens_per_s / pair["plain"].tokens_per_s, 4),
            "cpu_ratio": round(pair["elastic"].cpu_s / pair["plain"].cpu_s, 4),
        }
        for pair in rounds
    ]
    return {
        "overhead_vs_plain": round(statistics.median(pair["ratio"] for pair in pairs), 4),
        "cpu_vs_plain": round(statistics.median(pair["cpu_ratio"] for pair in pairs), 4),
        "overhead_pairs": pairs,
        "requests": requests,
        "budget_bytes": budget,
        "cpus": os.cpu_count(),
    }
