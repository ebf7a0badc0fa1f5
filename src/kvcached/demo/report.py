"""The demo's verdict: report.json and the same on the screen."""

from __future__ import annotations

import itertools
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kvcached.demo.compare import Comparison
from kvcached.demo.figures import Session, burst_windows, latency, session_figures
from kvcached.demo.models import Model
from kvcached.demo.setups import BLOCK_TOKENS, Options
from kvcached.demo.trace import PHASE_TITLES, PHASES
from kvcached.units import format_size


@dataclass(frozen=True, slots=True)
class Outcome:
    """All sessions of a demo and what was compared between them."""

    options: Options
    models: dict[str, Model]
    elastic: Session
    static: Session
    reference: Session | None
    comparison: Comparison
    elapsed_s: float


def build_report(outcome: Outcome) -> dict[str, Any]:
    """The contents of report.json. Sizes in bytes, times in the unit of their key."""
    elastic, static, options = outcome.elastic, outcome.static, outcome.options
    windows_s = burst_windows(elastic, static)
    results = elastic.results()
    report: dict[str, Any] = {
        "requests_total": len(results),
        "requests_failed": sum(not result.ok for result in results),
        "outputs_equal": outcome.comparison.equal,
        "outputs": outcome.comparison.as_json(),
        "budget_bytes": options.budget_bytes,
        **_memory(elastic),
        "elastic": session_figures(elastic, windows_s),
        "static": session_figures(static, windows_s),
        "reference": session_figures(outcome.reference, windows_s) if outcome.reference else None,
        "ttft_p99_static_over_elastic": _ratios(elastic, static),
        **_overhead(elastic, outcome.reference or static),
        "runs": options.runs,
        "prefix_caching": options.prefix_caching,
        "load": {**asdict(options.shape), "trace": "Azure LLM inference 2023, conversation"},
        "models": {name: _model(model) for name, model in outcome.models.items()},
        "block_tokens": BLOCK_TOKENS,
        "elapsed_s": round(outcome.elapsed_s, 1),
    }
    report["failures"] = failures(report)
    return report


def failures(report: dict[str, Any]) -> list[str]:
    """Why the demo failed; empty when it is a success."""
    found = []
    for name in ("elastic", "static", "reference"):
        if report[name] and report[name]["requests_failed"]:
            found.append(f"{report[name]['requests_failed']} requests failed ({name})")
    if not report["outputs_equal"]:
        found.append(f"{len(report['outputs']['different'])} outputs differ from the plain engine")
    budget = report["budget_bytes"]
    for key in ("physical_peak_bytes", "ledger_high_water_bytes"):
        if report[key] > budget:
            found.append(f"{key} {format_size(report[key])} is above {format_size(budget)}")
    if report["physical_peak_bytes"] == 0:
        found.append("no memory of kvcached was seen: the engines were not elastic")
    if not report["elastic"]["preemptions"]:
        found.append("no request was preempted (elastic): the load proves nothing about outputs")
    if not report["reclaimed_bytes"]:
        found.append("nothing was reclaimed between the engines")
    return found + _held_too_long(report["after_load"])


def _held_too_long(after_load: dict[str, dict[str, int]]) -> list[str]:
    return [
        f"engine {name} still holds {format_size(figures['physical_bytes'])} after the load, "
        f"more than {format_size(figures['allowed_bytes'])}"
        for name, figures in after_load.items()
        if figures["physical_bytes"] > figures["allowed_bytes"]
    ]


def _after_load(elastic: Session) -> dict[str, dict[str, int]]:
    """What each engine holds at rest, and what it may: its pinned page and one warm page."""
    found = {}
    for name, physical in zip(elastic.engines, elastic.physical_after, strict=False):
        account = elastic.ledger_after.account(name) if elastic.ledger_after else None
        pinned, page = (account.pinned, account.page_bytes) if account else (0, 0)
        found[name] = {
            "physical_bytes": physical,
            "pinned_bytes": pinned,
            "page_bytes": page,
            "allowed_bytes": pinned + page,
        }
    return found


def _memory(elastic: Session) -> dict[str, Any]:
    samples, after = elastic.samples, elastic.ledger_after
    gaps_ms = [(b.at_s - a.at_s) * 1e3 for a, b in itertools.pairwise(samples)] or [0.0]
    accounts = after.accounts if after else ()
    return {
        "physical_peak_bytes": max((sample.total for sample in samples), default=0),
        "physical_peak_by_engine": {
            name: max((sample.engine_bytes[index] for sample in samples), default=0)
            for index, name in enumerate(elastic.engines)
        },
        "physical_after_bytes": sum(elastic.physical_after),
        "after_load": _after_load(elastic),
        "pinned_bytes": sum(account.pinned for account in accounts),
        "accounts_after": [asdict(account) for account in accounts],
        "ledger_high_water_bytes": after.high_water if after else 0,
        "reclaimed_bytes": sum(account.reclaimed for account in accounts),
        "leases_refused": sum(account.leases_refused for account in accounts),
        "sampling": {
            "samples": len(samples),
            "interval_ms": {
                "mean": round(statistics.fmean(gaps_ms), 2),
                "max": round(max(gaps_ms), 2),
                "over_5_ms": sum(gap > 5 for gap in gaps_ms),
            },
        },
    }


def _ratios(elastic: Session, static: Session) -> dict[str, float]:
    """Static over elastic TTFT p99: the median over runs, run i against run i."""
    ratios = {}
    for name in PHASES:
        pairs = zip(static.phase(name), elastic.phase(name), strict=True)
        ratios[name] = round(
            statistics.median(
                latency(r.ttft_ms for r in slow.results)["p99"]
                / latency(r.ttft_ms for r in fast.results)["p99"]
                for slow, fast in pairs
            ),
            2,
        )
    return ratios


def _overhead(elastic: Session, plain: Session) -> dict[str, Any]:
    pairs = [
        (round(a, 1), round(b, 1))
        for a, b in zip(elastic.alone_tokens_per_s, plain.alone_tokens_per_s, strict=False)
    ]
    ratio = statistics.median(a / b for a, b in pairs) if pairs else None
    return {
        "overhead_vs_plain": round(ratio, 3) if ratio is not None else None,
        "overhead_pairs": [{"elastic_tokens_per_s": a, "plain_tokens_per_s": b} for a, b in pairs],
    }


def _model(model: Model) -> dict[str, Any]:
    return {"name": model.name, "kv_bytes_per_token": model.token_bytes, "layers": model.layers}


def write_report(report: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(report, indent=2) + "\n")


def print_report(report: dict[str, Any], console: Console, out: Path) -> None:
    """The report for people."""
    console.print()
    console.print(_comparison_table(report))
    console.print(_facts_table(report))
    console.print(f"\nPicture: {out / 'memory.png'}   Figures: {out / 'report.json'}")
    if report["failures"]:
        for failure in report["failures"]:
            console.print(f"[bold red]FAILED[/bold red] {failure}")
    else:
        console.print(
            "[bold green]OK[/bold green] every request answered, outputs equal, "
            "budget never exceeded"
        )


def _comparison_table(report: dict[str, Any]) -> Table:
    """Fits a screen of 80 columns: static and elastic share a cell, one below the other."""
    title = "One budget: in each cell the halves above, the shared pool below"
    table = Table(title=title, title_justify="left", show_lines=True)
    table.add_column("phase", no_wrap=True)
    for heading in (
        "TTFT mean, s",
        "TTFT p99, s",
        "p99 ratio",
        "all done, s",
        "done in window",
        "pre- empted",
    ):
        table.add_column(heading, justify="right")
    for name in PHASES:
        slow, fast = report["static"]["phases"][name], report["elastic"]["phases"][name]
        mean, p99 = (
            f"{slow['ttft_ms'][key] / 1e3:.2f}\n{fast['ttft_ms'][key] / 1e3:.2f}"
            for key in ("mean", "p99")
        )
        table.add_row(
            PHASE_TITLES[name],
            mean,
            p99,
            f"{report['ttft_p99_static_over_elastic'][name]:.2f} x",
            f"{slow['seconds']:.1f}\n{fast['seconds']:.1f}",
            f"{slow['finished_in_window']:g}\n{fast['finished_in_window']:g}",
            f"{sum(slow['preemptions'].values())}\n{sum(fast['preemptions'].values())}",
        )
    table.caption = "TTFT: time to first token. Window: when the faster one was done."
    return table


def _facts_table(report: dict[str, Any]) -> Table:
    outputs, sampling = report["outputs"], report["sampling"]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows = {
        "Requests": f"{report['requests_total']}, failed {report['requests_failed']}",
        "Outputs": f"{outputs['identical']} of {outputs['compared']} identical to the plain "
        f"engine, {len(outputs['ties'])} ties, {len(outputs['different'])} different",
        "Budget": f"{format_size(report['budget_bytes'])}; physical peak "
        f"{format_size(report['physical_peak_bytes'])}, ledger high-water mark "
        f"{format_size(report['ledger_high_water_bytes'])}",
        "After the load": ", ".join(
            f"{name} holds {format_size(figures['physical_bytes'])} (pinned "
            f"{format_size(figures['pinned_bytes'])}, page {format_size(figures['page_bytes'])})"
            for name, figures in report["after_load"].items()
        ),
        "Sharing": f"reclaimed {format_size(report['reclaimed_bytes'])}, "
        f"preemptions {report['elastic']['preemptions']}, "
        f"leases refused {report['leases_refused']}",
        "Sampling": f"{sampling['samples']} samples, every {sampling['interval_ms']['mean']} ms, "
        f"longest gap {sampling['interval_ms']['max']} ms",
        "Speed alone": f"{report['overhead_vs_plain']} of a plain engine's tokens/s",
    }
    for name, text in rows.items():
        table.add_row(f"[bold]{name}[/bold]", text)
    return table
