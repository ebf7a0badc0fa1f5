"""The figures of ``multi_llm.py``: from what each request met to tables. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arrivals import spread

SIDES = ("static", "elastic", "swap")
AGAINST = {"static": "static", "swap": "one at a time"}
"""What elastic is compared with, in words."""


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request should get: seconds to its first token, and between tokens."""

    ttft_s: float
    tpot_s: float


def figures(
    rows: Sequence[Sequence[float] | None],
    asks: Sequence[Sequence[float]],
    slo: Slo,
    seconds: float,
) -> dict[str, Any]:
    """What these requests met. A row is [late, first token after that, between tokens, tokens], or
    None for a request that had not ended when the point was given up: it missed its SLO, and
    latencies are those of the others.
    """
    done = [(row, ask) for row, ask in zip(rows, asks, strict=True) if row is not None]
    ttft = [row[0] + row[1] for row, _ in done]
    tpot = [row[2] for row, _ in done if row[3] > 1]
    met = sum(row[0] + row[1] <= slo.ttft_s and row[2] <= slo.tpot_s for row, _ in done)
    return {
        "requests": len(rows),
        "unfinished": len(rows) - len(done),
        "wrong_length": sum(row[3] != ask[2] for row, ask in done),
        "ttft_s": spread(ttft),
        "tpot_s": spread(tpot),
        "slo": met / len(rows) if rows else None,
        "goodput_per_s": met / seconds,
        "output_tokens_per_s": sum(row[3] for row, _ in done) / seconds,
    }


def point_figures(
    results: Sequence[Mapping[str, Any]], point: Mapping[str, Any], slo: Slo
) -> dict[str, Any]:
    """One load point of one side. ``results`` are the engines' own, by model."""
    seconds = max(result["seconds"] for result in results)
    pairs = [
        list(zip(result["each"], asks, strict=True))
        for result, asks in zip(results, point["models"], strict=True)
    ]
    width = point["peaks"]["width_s"]
    in_peaks = [
        (row, ask)
        for model, both in enumerate(pairs)
        for row, ask in both
        if model * width <= ask[0] <= (model + 1) * width
    ]
    everything = [pair for both in pairs for pair in both]
    groups = {"all": everything, "peaks": in_peaks}
    groups |= {f"model {model}": both for model, both in enumerate(pairs)}
    return {
        "seconds": seconds,
        **{
            name: figures([row for row, _ in both], [ask for _, ask in both], slo, seconds)
            for name, both in groups.items()
        },
        "preemptions": [result["num_preemptions"] for result in results],
        "hit_rate": [
            result["prefix_cache_hits"] / result["prefix_cache_queries"]
            if result["prefix_cache_queries"]
            else None
            for result in results
        ],
        "caches_forgotten": all(result["forgotten"] for result in results),
    }


def comparison(sides: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each other side over elastic, by load point and group, where both have the point."""
    elastic = sides.get("elastic", {}).get("points", {})
    found = []
    both = [
        (side, name, theirs)
        for side in AGAINST
        for name, theirs in sides.get(side, {}).get("points", {}).items()
        if name in elastic
    ]
    for side, name, theirs in both:
        for group in groups_of(theirs):
            before, after = theirs[group], elastic[name][group]
            found.append(
                {
                    "point": name,
                    "group": group,
                    "against": side,
                    **{
                        f"{what}_{key}": ratio(before[what], after[what], key)
                        for what in ("ttft_s", "tpot_s")
                        for key in ("mean", "p50", "p99")
                    },
                    f"slo_{side}": before["slo"],
                    "slo_elastic": after["slo"],
                }
            )
    return found


def groups_of(point: Mapping[str, Any]) -> list[str]:
    return [name for name, value in point.items() if isinstance(value, dict)]


def ratio(before: Mapping[str, float], after: Mapping[str, float], key: str) -> float | None:
    return before[key] / after[key] if before and after and after[key] else None


def extremes(
    compared: Sequence[Mapping[str, Any]], key: str, group: str = "all", against: str = "static"
) -> dict[str, Any]:
    """The load points at which a ratio is best and worst."""
    known = [
        one
        for one in compared
        if one["group"] == group and one["against"] == against and one[key] is not None
    ]
    if not known:
        return {}
    best, worst = max(known, key=lambda one: one[key]), min(known, key=lambda one: one[key])
    return {
        "best": {"point": best["point"], "ratio": best[key]},
        "worst": {"point": worst["point"], "ratio": worst[key]},
    }


def table(report: Mapping[str, Any]) -> str:
    """A line for each load point, side and group, and where the ratios are best and worst."""
    lines = [
        f"{'point':8} {'requests':9} {'side':8} {'n':>5} {'open':>4}"
        f" {'TTFT mean':>9} {'p50':>7} {'p99':>7} {'TPOT mean':>9} {'p99':>7} {'SLO':>6}"
        f" {'good/s':>6} {'tok/s':>6} {'preempted':>9}"
    ]
    sides = report["sides"]
    points = list(dict.fromkeys(p for side in sides.values() for p in side["points"]))
    for name in points:
        for group in groups_of(
            next(s["points"][name] for s in sides.values() if name in s["points"])
        ):
            for side in SIDES:
                point = sides.get(side, {}).get("points", {}).get(name)
                if point is not None:
                    lines.append(_line(name, group, side, point))
    for side, name in AGAINST.items():
        for key, words in (("ttft_s_mean", "TTFT mean"), ("ttft_s_p99", "TTFT p99")):
            for group in ("all", "peaks"):
                found = extremes(report["comparison"], key, group, side)
                if found:
                    best, worst = found["best"], found["worst"]
                    lines.append(
                        f"{words}, {name} over elastic, {group}: best {best['ratio']:.2f} at "
                        f"{best['point']}, worst {worst['ratio']:.2f} at {worst['point']}"
                    )
    for side, one in sides.items():
        for point, why in one["skipped"].items():
            lines.append(f"not run: {side} {point}: {why}")
        if one.get("problem"):
            lines.append(f"PROBLEM: {side}: {one['problem']}")
    return "\n".join(lines)


def _line(name: str, group: str, side: str, point: Mapping[str, Any]) -> str:
    one = point[group]
    if not one["ttft_s"]:
        return f"{name:8} {group:9} {side:8} {one['requests']:5} nothing ended"
    preempted = {"all": sum(point["preemptions"]), "peaks": None}.get(group, 0)
    if group.startswith("model "):
        preempted = point["preemptions"][int(group.split()[1])]
    ttft = {key: 1e3 * value for key, value in one["ttft_s"].items()}
    tpot = {key: 1e3 * value for key, value in one["tpot_s"].items()} or {"mean": 0.0, "p99": 0.0}
    return (
        f"{name:8} {group:9} {side:8} {one['requests']:5} {one['unfinished']:4}"
        f" {ttft['mean']:9.0f} {ttft['p50']:7.0f} {ttft['p99']:7.0f}"
        f" {tpot['mean']:9.1f} {tpot['p99']:7.1f} {one['slo']:6.1%}"
        f" {one['goodput_per_s']:6.2f} {one['output_tokens_per_s']:6.0f}"
        f" {'' if preempted is None else f'{preempted:.0f}':>9}"
    )
