"""memory.png: physical bytes of both engines over time under the budget, and who waited."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvcached.demo.figures import Session, latency
from kvcached.demo.sampler import Sample
from kvcached.demo.trace import PHASE_TITLES, PHASES
from kvcached.units import MIB, format_size

COLOURS = ("#2f6f9f", "#e08e45")
STATIC_COLOUR = "#b9b4ab"
ELASTIC_COLOUR = "#3f8f6b"  # not an engine's: these bars are of both
INK = "#33312e"
MAX_POINTS = 4000


def draw_memory(
    elastic: Session, static: Session, budget_bytes: int, models: dict[str, str], path: Path
) -> None:
    """Writes the picture. ``models`` maps engines to model names for the legend."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"font.size": 10, "text.color": INK, "axes.labelcolor": INK}):
        figure, (top, bottom) = pyplot.subplots(
            2, 1, figsize=(11, 7), height_ratios=(2.2, 1), layout="constrained"
        )
        _draw_bytes(top, elastic, budget_bytes, models)
        _draw_ttft(bottom, elastic, static)
        for axes in (top, bottom):
            axes.spines[["top", "right"]].set_visible(False)
            axes.spines[["left", "bottom"]].set_color("#aaa")
            axes.tick_params(colors="#666")
        figure.savefig(path, dpi=130)
        pyplot.close(figure)


def _draw_bytes(axes: Any, elastic: Session, budget_bytes: int, models: dict[str, str]) -> None:
    run = elastic.runs[0]
    start_s, end_s = run[0].start_s - 1.0, run[-1].end_s + 0.5
    shown = [sample for sample in elastic.samples if start_s <= sample.at_s <= end_s]
    shown = _thin(shown)
    times = [sample.at_s - start_s for sample in shown]
    layers = [
        [sample.engine_bytes[index] / MIB for sample in shown]
        for index in range(len(elastic.engines))
    ]
    labels = [f"engine {name}: {models[name]}" for name in elastic.engines]
    axes.stackplot(times, *layers, labels=labels, colors=COLOURS, alpha=0.9, linewidth=0)
    axes.axhline(budget_bytes / MIB, color="#b3261e", linewidth=1.4, linestyle="--")
    axes.text(
        end_s - start_s,
        budget_bytes / MIB,
        f" budget {format_size(budget_bytes)} ",
        color="#b3261e",
        ha="right",
        va="bottom",
        fontsize=9,
    )
    axes.axhline(budget_bytes / 2 / MIB, color="#999", linewidth=0.8, linestyle=":")
    axes.text(0, budget_bytes / 2 / MIB, " half of it", color="#777", va="bottom", fontsize=8)
    for phase in run:
        axes.axvspan(phase.start_s - start_s, phase.end_s - start_s, color="#000", alpha=0.035)
        middle = (phase.start_s + phase.end_s) / 2 - start_s
        axes.text(
            middle,
            budget_bytes * 1.12 / MIB,
            PHASE_TITLES[phase.phase],
            ha="center",
            va="bottom",
            fontsize=9,
        )
    axes.set(
        xlim=(0, end_s - start_s),
        ylim=(0, budget_bytes * 1.22 / MIB),
        xlabel="seconds",
        ylabel="physical KV memory, MiB",
    )
    axes.set_title("One budget, two engines: memory goes to whoever works", loc="left", pad=14)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=9)


def _thin(samples: list[Sample]) -> list[Sample]:
    """Keeps the highest sample of each stretch, so that no peak is lost from the picture."""
    step = max(1, len(samples) // MAX_POINTS)
    stretches = (samples[at : at + step] for at in range(0, len(samples), step))
    return [max(stretch, key=lambda sample: sample.total) for stretch in stretches]


def _draw_ttft(axes: Any, elastic: Session, static: Session) -> None:
    labels, values, colours = [], [], []
    for name in reversed(PHASES):
        for session, colour in ((elastic, ELASTIC_COLOUR), (static, STATIC_COLOUR)):
            results = [r for phase in session.phase(name) for r in phase.results]
            kind = "shared" if session is elastic else "halves"
            labels.append(f"{PHASE_TITLES[name]}: {kind}")
            values.append(latency(r.ttft_ms for r in results).get("p99", 0.0) / 1e3)
            colours.append(colour)
    bars = axes.barh(labels, values, color=colours, height=0.7)
    axes.bar_label(bars, fmt="%.2f s", padding=4, fontsize=9, color="#555")
    axes.margins(x=0.12)
    axes.set_title(
        "Time to first token, 99th percentile: shared budget and static halves",
        loc="left",
        fontsize=10,
    )
    axes.tick_params(axis="x", labelbottom=False, bottom=False)
    axes.spines["bottom"].set_visible(False)
