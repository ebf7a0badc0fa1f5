#!/usr/bin/env python3
"""Makes the tables of docs/performance.md from the results in benchmarks/results.

They stand between two lines that say so; what is around them is written by hand. ``--check``
changes nothing and fails where the page differs from what it would be.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
BEGIN = "<!-- made by benchmarks/performance.py from benchmarks/results: change those -->"
END = "<!-- end of what benchmarks/performance.py makes -->"

Rows = Iterable[Iterable[object]]


def table(headings: Iterable[str], rows: Rows) -> str:
    heads = list(headings)
    lines = [heads, ["---"] * len(heads), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fragmentation(result: Mapping[str, Any]) -> str:
    sizes = sorted({run["page_mib"] for run in result["runs"]})
    kinds = list(dict.fromkeys((run["mode"], run["at_once"]) for run in result["runs"]))
    by_key = {(run["mode"], run["at_once"], run["page_mib"]): run for run in result["runs"]}
    words = {
        "steady": "always so many requests",
        "day": "arrivals of a day",
        "compacted": "arrivals of a day, compacted",
        "cached": "arrivals of a day, prefix cache, memory full",
    }
    rows = [
        [words[mode], count, *(_ratio(by_key.get((mode, count, size))) for size in sizes)]
        for mode, count in kinds
    ]
    return (
        f"Mapped bytes over bytes in use or cached, {result['hours']:g} simulated hours (in "
        "brackets the 99th percentile of samples ten seconds apart); blocks of an 8B model.\n\n"
        + table(["", "requests at once", *(f"{size} MiB pages" for size in sizes)], rows)
    )


def _ratio(run: Mapping[str, Any] | None) -> str:
    return "" if run is None else f"{run['ratio']['of_sums']:.3f} ({run['ratio']['p99']:.2f})"


def simulate(result: Mapping[str, Any]) -> str:
    needs = result["needed"]
    words = {
        "elastic": "one KV budget a GPU",
        "even": "equal parts",
        "load": "parts by mean load",
        "swap": "one model awake at a time",
    }
    gpus = list(dict.fromkeys(run["gpus"] for run in result["runs"]))
    by_key = {(run["side"], run["gpus"]): run for run in result["runs"]}
    rows = [
        [
            words[side],
            needs[side] or f"more than {gpus[-1]}",
            *(f"{by_key[side, count]['slo']:.2%}" for count in gpus),
        ]
        for side in needs
    ]
    slo = result["slo"]
    return (
        f"{result['models']} models ({', '.join(result['mix'])} in turn), {result['requests']} "
        f"requests in {result['minutes']:g} simulated minutes; SLO: first token within "
        f"{slo['ttft_s']:g} s, then {1e3 * slo['tpot_s']:g} ms a token. Requests that meet it, by "
        "number of GPUs, and the smallest number with which "
        f"{slo['part']:.0%} do:\n\n"
        + table(["", "GPUs needed", *(f"{count} GPUs" for count in gpus)], rows)
    )


def scale(result: Mapping[str, Any]) -> str:
    parts = {
        "blocks": "blocks in a pool",
        "instances": "instances on a ledger",
        "standings": "accounts, the policy's arithmetic alone",
        "pages": "bytes of a page",
    }
    texts = []
    for part, words in parts.items():
        sizes = list(result[part])
        rows = [
            [key.removesuffix("_us"), *(f"{result[part][size][key]:.3f}" for size in sizes), times]
            for key, times in result["growth"][part].items()
        ]
        texts.append(f"By {words}, µs:\n\n" + table(["", *sizes, "growth"], rows))
    return "\n\n".join(texts)


def elasticity(result: Mapping[str, Any]) -> str:
    mib = result["page_bytes"] / (1 << 20)
    rows = [
        ["open", result["open_ms"], "", ""],
        ["the first page's blocks", result["first_blocks_ms"], "", ""],
    ]
    rows += [
        [words, *(result[f"{way}{unit}"] for unit in ("_ms", "_slowest_ms", "_gib_per_s"))]
        for way, words in (("grow", "grow by the others"), ("shrink", "give all back"))
    ]
    return (
        f"{result['pages']} pages of {mib:g} MiB on {result['backend']}, medians of "
        f"{result['rounds']} rounds; {result['rest_pages']} pages are held at rest.\n\n"
        + table(["", "ms", "slowest", "GiB/s"], rows)
    )


AGAINST = {"static": "static parts", "swap": "one model awake at a time"}


def multi_llm(result: Mapping[str, Any]) -> str:
    about = (
        f"{', '.join(result['shapes'])} on one GPU, {result['kv_bytes'] / (1 << 30):g} GiB of KV "
        "cache in all"
    )
    # Results that were kept before there was a third side name none.
    sides = [row.get("against", "static") for row in result["comparison"]]
    return "\n\n".join(
        f"{about}; {AGAINST[side]} / elastic, and how many times longer the first takes.\n\n"
        + _compared(result, side)
        for side in AGAINST
        if side in sides
    )


def _compared(result: Mapping[str, Any], side: str) -> str:
    rows = []
    for row in result["comparison"]:
        if row["group"] not in ("all", "peaks") or row.get("against", "static") != side:
            continue
        cells = [row["point"], row["group"]]
        for key in ("ttft_s", "tpot_s"):
            for figure in ("mean", "p99"):
                cells.append(_both(result, row, side, key, figure))
        cells.append(f"{row[f'slo_{side}']:.1%} / {row['slo_elastic']:.1%}")
        points = [result["sides"][one]["points"][row["point"]] for one in (side, "elastic")]
        cells.append(" / ".join(f"{point[row['group']]['goodput_per_s']:.1f}" for point in points))
        if row["group"] == "all":
            cells.append(" / ".join(f"{sum(point['preemptions']):.0f}" for point in points))
            cells.append(" / ".join(_hits(point) for point in points))
        else:
            cells += ["", ""]
        rows.append(cells)
    figures = ["TTFT mean", "TTFT p99", "TPOT mean", "TPOT p99", "SLO", "in time/s"]
    return table(["peaks", "requests", *figures, "preempted", "prefix hits"], rows)


def _hits(point: Mapping[str, Any]) -> str:
    """Of the engines' prefix caches, on average; none where they have none."""
    rates = [rate for rate in point["hit_rate"] if rate is not None]
    return f"{sum(rates) / len(rates):.1%}" if rates else "none"


def _both(
    result: Mapping[str, Any], row: Mapping[str, Any], side: str, key: str, figure: str
) -> str:
    values = [
        result["sides"][one]["points"][row["point"]][row["group"]][key].get(figure)
        for one in (side, "elastic")
    ]
    if None in values:
        return ""
    return f"{1e3 * values[0]:.0f} / {1e3 * values[1]:.0f} ms ({row[f'{key}_{figure}']:.2f})"


# What each ratio is of, in words; where its figures are, and how many decimals they have.
WORKS = {
    "pairs": ("200 requests at once, 1024 tokens in, 512 out", "tokens_per_s", 0),
    "short": ("400 requests at once, 128 in, 128 out", "short_tokens_per_s", 0),
    "short-again": ("400 others like these, after them", "short-again_tokens_per_s", 0),
    "sustained": ("1600 at once, 128 in, 128 out", "sustained_tokens_per_s", 0),
    "long": ("64 requests at once, 3500 in, 256 out", "long_tokens_per_s", 0),
    "paced_tpot_p99": (
        "300, 15 a second, 512 in, 128 out: TPOT p99, ms",
        "paced_tpot_p99_ms",
        2,
    ),
}


def overhead(result: Mapping[str, Any]) -> str:
    rows = []
    for one in result["summaries"]:
        plain = one["kinds"]["plain"]
        for kind, row in one["kinds"].items():
            for work, (words, key, decimals) in WORKS.items():
                if kind == "plain" or f"{work}_of_plain" not in row:
                    continue
                cells = _of_plain(plain[key], row[key], row[f"{work}_of_plain"], decimals)
                rows.append([f"{one['runner']} {kind}", words, *cells])
    caching = "with" if result["prefix_caching"] else "without"
    return (
        f"One engine of the {result['shape']} shape alone on the GPU, {caching} prefix caching, "
        "plain and with kvcached in turns; tokens a second where nothing else is said (medians), "
        "and the ratios of the pairs."
        "\n\n" + table(OF_PLAIN, rows)
    )


def _of_plain(
    plain: Sequence[float], ours: Sequence[float], ratio: Mapping[str, float], decimals: int
) -> list[object]:
    """Cells of a row: how many pairs, the medians, and the ratios of the pairs."""
    return [
        min(len(plain), len(ours)),
        *(f"{statistics.median(values):.{decimals}f}" for values in (plain, ours)),
        *(f"{ratio[each]:.4f}" for each in ("median", "least", "most")),
    ]


OF_PLAIN = ("", "", "pairs", "plain", "kvcached", "of plain", "least", "most")
NUMBERED = {
    "paced": "300 requests, 15 a second, 512 in, 128 out",
    "throughput": WORKS["pairs"][0],
    **{name: WORKS[name][0] for name in ("short", "sustained", "long")},
}
# What these figures are called, and their decimals; one is what a work is about (``figures``).
FIGURES = {
    "tokens_per_s": ("tokens/s", 0),
    "tpot_p99_ms": ("TPOT p99, ms", 2),
    "tpot_mean_ms": ("TPOT mean, ms", 2),
    "ttft_p99_ms": ("TTFT p99, ms", 0),
}


def pairs(result: Mapping[str, Any]) -> str:
    rows = []
    for work, told in result["works"].items():
        about = result["figures"][work]
        for key in (about, *(key for key in FIGURES if key != about)):
            if work == "paced" and key == "tokens_per_s":
                continue  # as many as arrive
            plain, ours = (
                [one[side][key] for one in told["pairs"]] for side in ("plain", "kvcached")
            )
            words, decimals = FIGURES[key]
            cells = _of_plain(plain, ours, told["of_plain"][key], decimals)
            rows.append([NUMBERED[work] if key == about else "", words, *cells])
    caching = "with" if result["prefix_caching"] else "without"
    how = "compiled, prompts as graphs" if result["compiled"] else "prompts kernel by kernel"
    return (
        f"{result['engines']} plain and {result['engines']} with kvcached, all alive, that answer "
        f"the same requests in turn; {result['shape']}, {result['runner']}, {caching} prefix "
        f"caching, {how}. Medians, and the ratios of the pairs.\n\n" + table(OF_PLAIN, rows)
    )


def reclaim(result: Mapping[str, Any]) -> str:
    rows = []
    for kind, words in (("idle", "at rest"), ("busy", "at work")):
        if (figures := result.get(kind)) is None:
            continue
        spreads = [
            " / ".join(f"{value:.1f}" for value in figures[key].values()) if key in figures else ""
            for key in ("demand_to_lease_ms", "lease_past_step_ms", "ttft_ms", "ttft_alone_ms")
        ]
        rows.append([words, figures["rounds"], *spreads, f"{figures['ttft_ratio']:.3f}"])
    mib = 1 << 20
    return (
        f"{result['instances']} engines of {result['model']} share "
        f"{result['budget_bytes'] / mib:.0f} MiB, {result['request_bytes'] / mib:.1f} MiB a "
        "request; milliseconds (p50 / p99 / the largest), and the median of each round's ratio of "
        "first tokens.\n\n"
        + table(
            [
                *("the neighbour is", "rounds", "from the demand to the lease"),
                *("past the end of its step", "first token", "alone", "ratio"),
            ],
            rows,
        )
    )


MAKERS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "fragmentation": fragmentation,
    "simulate": simulate,
    "scale": scale,
    "elasticity": elasticity,
    "multi_llm": multi_llm,
    "overhead": overhead,
    "pairs": pairs,
    "reclaim": reclaim,
}
TITLES = {
    "multi_llm": "Several models under intermittent peaks",
    "overhead": "One engine, plain and elastic",
    "pairs": "Engines in pairs, plain and elastic",
    "reclaim": "How soon memory comes",
    "fragmentation": "Fragmentation",
    "simulate": "Fleets, simulated",
    "elasticity": "Growing and shrinking",
    "scale": "Scale",
}


def section(name: str, kept: Mapping[str, Any]) -> str:
    """One result: its title, where it comes from, its tables."""
    result = kept["result"]
    kind = result["benchmark"]
    about = ", ".join(f"{key} {value}" for key, value in kept["versions"].items())
    return (
        f"### {TITLES[kind]} (`{name}.json`)\n\n"
        f"{kept['machine']}; {about}; {kept['date']}; `{kept['command']}`\n\n"
        f"{MAKERS[kind](result)}\n"
    )


def made(results: Path) -> str:
    """Everything that is made, in the order of ``TITLES``."""
    kept = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    order = sorted(kept, key=lambda name: (list(TITLES).index(_kind(kept[name])), name))
    return "\n".join(section(name, kept[name]) for name in order)


def _kind(kept: Mapping[str, Any]) -> str:
    return str(kept["result"]["benchmark"])


def page(text: str, content: str) -> str:
    """The page with its made part replaced. Raises ValueError where it has none."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError("the page lacks the two lines between which tables are made")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{content}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether it would change")
    options = parser.parse_args()
    text = PAGE.read_text()
    changed = page(text, made(RESULTS))
    if options.check:
        if changed != text:
            print(f"{PAGE} is not what {RESULTS} make of it: run benchmarks/performance.py")
        return int(changed != text)
    PAGE.write_text(changed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
