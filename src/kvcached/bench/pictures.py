"""Pictures of benchmarks' results. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COLOURS = {
    "elastic": "#3f8f6b",
    "even": "#b3261e",
    "static": "#b3261e",
    "load": "#2f6f9f",
    "swap": "#8a6d1f",
}
KINDS = ("#3f8f6b", "#2f6f9f", "#b3261e", "#8a6d1f")


@contextmanager
def _axes(path: Path, columns: int = 1) -> Iterator[Any]:
    """Axes in a row; written as a PNG when the block ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"font.size": 10}):
        size = (4 + 4 * columns, 4.5)
        figure, axes = pyplot.subplots(1, columns, figsize=size, layout="constrained")
        for each in axes if columns > 1 else [axes]:
            each.spines[["top", "right"]].set_visible(False)
        yield axes
        figure.savefig(path, dpi=130)
        pyplot.close(figure)


def fragmentation(result: dict[str, Any], path: Path) -> None:
    """The ratio by page size, a line for each number of requests at once; a panel a mode."""
    modes = list(dict.fromkeys(run["mode"] for run in result["runs"]))
    counts = sorted({run["at_once"] for run in result["runs"]})
    with _axes(path, max(2, len(modes))) as panels:
        for axes, mode in zip(panels, modes, strict=False):
            for count, colour in zip(counts, KINDS, strict=False):
                runs = [r for r in result["runs"] if r["mode"] == mode and r["at_once"] == count]
                axes.plot(
                    [run["page_mib"] for run in runs],
                    [run["ratio"]["of_sums"] for run in runs],
                    marker="o",
                    color=colour,
                    label=f"{count} requests",
                )
            axes.axhline(1.1, color="#999", linestyle="--")
            axes.set_xscale("log", base=2)
            sizes = sorted({run["page_mib"] for run in result["runs"]})
            axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
            axes.set_title(mode)
            axes.set_xlabel("page, MiB")
            axes.set_ylabel("mapped over in use or cached")
            axes.legend(frameon=False)


def simulation(result: dict[str, Any], path: Path) -> None:
    """The part of requests that meet their SLO, by number of GPUs."""
    with _axes(path) as axes:
        for side in dict.fromkeys(run["side"] for run in result["runs"]):
            runs = [run for run in result["runs"] if run["side"] == side]
            axes.plot(
                [run["gpus"] for run in runs],
                [100 * run["slo"] for run in runs],
                marker="o",
                color=COLOURS[side],
                label=side,
            )
        axes.axhline(100 * result["slo"]["part"], color="#999", linestyle="--")
        axes.set_xlabel(f"GPUs for {result['models']} models")
        axes.set_ylabel("requests that meet their SLO, %")
        axes.legend(frameon=False)


def multi_llm(report: dict[str, Any], path: Path) -> None:
    """Time to the first token by the height of the peaks: mean and p99, both sides."""
    with _axes(path, 2) as panels:
        for axes, key in zip(panels, ("mean", "p99"), strict=True):
            for side, told in report["sides"].items():
                points = sorted(
                    (float(name.removesuffix("/s")), point["all"]["ttft_s"][key])
                    for name, point in told["points"].items()
                    if point["all"]["ttft_s"]
                )
                axes.plot(
                    [rate for rate, _ in points],
                    [value for _, value in points],
                    marker="o",
                    color=COLOURS[side],
                    label=side,
                )
            axes.set_yscale("log")
            axes.set_xlabel("height of the peaks, requests a second")
            axes.set_ylabel(f"time to the first token, {key}, s")
            axes.legend(frameon=False)


def elasticity(result: dict[str, Any], path: Path) -> None:
    """Time to grow and to give back: the median round, and up to the slowest."""
    with _axes(path) as axes:
        for place, way in enumerate(("grow", "shrink")):
            median, slowest = result[f"{way}_ms"], result[f"{way}_slowest_ms"]
            axes.bar(
                place,
                median,
                yerr=[[0.0], [slowest - median]],
                capsize=6,
                color=KINDS[place],
            )
        axes.set_xticks([0, 1], ["grow", "give back"])
        size_gib = result["pages"] * result["page_bytes"] / (1 << 30)
        axes.set_title(f"{size_gib:g} GiB on {result['backend']}, median and slowest")
        axes.set_ylabel("ms")


def scale(result: dict[str, Any], path: Path) -> None:
    """What operations cost by size; a panel for each thing that grows."""
    parts = {
        "blocks": "blocks in a pool",
        "instances": "instances",
        "standings": "accounts, policy alone",
        "pages": "bytes of a page",
    }
    with _axes(path, len(parts)) as panels:
        for axes, (part, words) in zip(panels, parts.items(), strict=True):
            sizes = list(result[part])
            for key in result[part][sizes[0]]:
                axes.plot(
                    [int(size) for size in sizes],
                    [result[part][size][key] for size in sizes],
                    marker="o",
                    label=key.removesuffix("_us"),
                )
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlabel(words)
            axes.set_ylabel("µs")
            axes.legend(frameon=False)


def reclaim(result: dict[str, Any], path: Path) -> None:
    """From the demand to the lease, with the neighbour at rest and at work; real engines."""
    from kvcached.bench.reclaim import KINDS as NEIGHBOURS  # who draws others needs no httpx

    with _axes(path) as axes:
        kinds = {kind: words for kind, words in NEIGHBOURS.items() if kind in result}
        for place, kind in enumerate(kinds):
            spread = result[kind]["demand_to_lease_ms"]
            for key, width in (("max", 0.3), ("p99", 0.5), ("p50", 0.7)):
                label = key if place == 0 else None
                colour = KINDS[("p50", "p99", "max").index(key)]
                axes.bar(place, spread[key], width, color=colour, label=label)
        axes.set_xticks(range(len(kinds)), [f"neighbour {words}" for words in kinds.values()])
        axes.set_ylabel("from the demand to the lease, ms")
        axes.legend(frameon=False)


def overhead(summaries: list[dict[str, Any]], works: Sequence[str], path: Path) -> None:
    """The speed of each kind of engine over plain vLLM's, in these works: every pair, and the
    median.
    """
    bars = [
        (f"{one['runner']} {kind}\n{name.removesuffix('s')}", row[f"{name}_of_plain"])
        for one in summaries
        for kind, row in one.get("kinds", {}).items()
        for name in works
        if kind != "plain" and f"{name}_of_plain" in row
    ]
    with _axes(path) as axes:
        for place, (_, ratio) in enumerate(bars):
            low, high = ratio["median"] - ratio["least"], ratio["most"] - ratio["median"]
            axes.errorbar(
                place, ratio["median"], yerr=[[low], [high]], marker="o", capsize=6, color=KINDS[0]
            )
        axes.axhline(1.0, color="#999", linestyle="--")
        axes.set_xticks(range(len(bars)), [words for words, _ in bars])
        axes.set_ylabel("tokens a second, over plain vLLM's")


def pairs(works: dict[str, Any], wanted: dict[str, str], path: Path) -> None:
    """Engines with kvcached over plain ones: each pair, and the median. ``wanted``: of each work,
    the figure that is drawn.
    """
    with _axes(path) as axes:
        for place, (work, told) in enumerate(works.items()):
            key = wanted[work]
            ratios = [one["kvcached"][key] / one["plain"][key] for one in told["pairs"]]
            axes.plot([place] * len(ratios), ratios, "o", color=KINDS[0], alpha=0.6)
            axes.plot(place, told["of_plain"][key]["median"], "_", color=KINDS[1], markersize=30)
        axes.axhline(1.0, color="#999", linestyle="--")
        words = [f"{work}\n{wanted[work].replace('_', ' ')}" for work in works]
        axes.set_xticks(range(len(words)), words)
        axes.set_xlim(-0.5, len(words) - 0.5)
        axes.set_ylabel("over plain vLLM's")


def moved(told: dict[str, Any], path: Path) -> None:
    """Memory that went from an engine to another on a GPU, by time; A at rest and at work."""
    with _axes(path, 2) as panels:
        for axes, wave in zip(panels, ("idle", "busy"), strict=True):
            curve = told[wave].get("curve", [])
            for column, label in ((1, "A is charged"), (2, "B is charged"), (3, "B waits for")):
                axes.plot(
                    [row[0] for row in curve],
                    [row[column] for row in curve],
                    color=KINDS[column - 1],
                    label=label,
                )
            axes.set_title(f"A {'at rest' if wave == 'idle' else 'at work'}")
            axes.set_xlabel("ms after the demand")
            axes.set_ylabel("GiB")
            axes.legend(frameon=False)
