"""Pictures of benchmarks' results. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterator
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
