"""A load point of several models, as one of their engines plays it; see ``multi_llm.py``."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from turns import Turns
from workloads import LOW_TOKEN, Ask, play


def play_point(
    llm: Any, path: Path, model: int, start_file: Path, turns: Turns | None = None
) -> dict[str, Any]:
    """One load point of several models (``arrivals.plan``, in ``path``), or its skipping. The start
    file says which point, and when it begins on the system's monotonic clock: everybody's prompts
    are made by then.
    """
    told = json.loads(start_file.read_text())
    if told["skip"]:
        return {"skipped": True}
    plan = json.loads(path.read_text())
    asks = point_asks(plan, told["point"], model)
    point = plan["points"][told["point"]]
    forgotten = _forget_all(llm)
    before = _counters(llm)
    time.sleep(max(0.0, told["start_s"] - time.monotonic()))
    limit = point["span_s"] + plan["give_up_s"]
    result = play(llm, asks, start_s=told["start_s"], give_up_s=limit, turns=turns)
    if turns is not None:
        turns.leave()
    after = _counters(llm)
    given = result["tokens"]
    return {
        "skipped": False,
        "forgotten": forgotten,
        "seconds": result["seconds"],
        "each": [
            None if row is None else [*(round(value, 5) for value in row), len(answer or ())]
            for row, answer in zip(result["each"], given, strict=True)
        ],
        "steps": result["steps"],
        "wakes_s": turns.wakes[-200:] if turns is not None else [],
        **{name: after[name] - before[name] for name in after},
    }


def point_asks(plan: Mapping[str, Any], name: str, model: int) -> list[Ask]:
    """One model's requests at a load point. Prompts are random tokens; where the plan names what
    they begin with, equal names are equal tokens.
    """
    point = plan["points"][name]
    seed = f"{plan['seed']}/{name}/{model}"
    draw = random.Random(seed)
    ids = range(LOW_TOKEN, plan["vocabulary"])
    rows = point["models"][model]
    beginnings = point["prefixes"][model] if "prefixes" in point else [[]] * len(rows)
    parts: dict[int, list[int]] = {}
    asks = []
    for (at_s, length, answer), names in zip(rows, beginnings, strict=True):
        prompt: list[int] = []
        for each in names:
            if each not in parts:
                one = random.Random(f"{seed}/{each}")
                parts[each] = one.choices(ids, k=plan["prefix_tokens"])
            prompt += parts[each]
        prompt += draw.choices(ids, k=max(0, int(length) - len(prompt)))
        asks.append(Ask(prompt[: int(length)], int(answer), at_s=at_s))
    return asks


def _forget_all(llm: Any) -> bool:
    """Drops the prefix cache; False where the engine would not within five seconds."""
    for _ in range(100):
        if llm.reset_prefix_cache() is not False:
            return True
        time.sleep(0.05)  # the last step's blocks are held a moment longer
    return False


def _counters(llm: Any) -> dict[str, float]:
    names = ("num_preemptions", "prefix_cache_queries", "prefix_cache_hits")
    metrics = llm.get_metrics()
    return {name: sum(m.value for m in metrics if m.name == f"vllm:{name}") for name in names}
