"""Figures of a session: latencies, finished requests, preemptions; medians over runs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kvcached.cli.accounts import LedgerFigures
from kvcached.demo.load import Result
from kvcached.demo.percentiles import percentile
from kvcached.demo.sampler import Sample
from kvcached.demo.trace import PHASES


@dataclass(slots=True)
class PhaseRun:
    """One phase of one run: its window on the monotonic clock, results, preemptions by engine."""

    phase: str
    start_s: float
    end_s: float
    results: list[Result]
    preemptions: dict[str, int]

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s

    def finished_within(self, window_s: float) -> int:
        """Requests completed in the phase's first ``window_s`` seconds."""
        limit = self.start_s + window_s
        return sum(r.ok and r.last_s is not None and r.last_s <= limit for r in self.results)


@dataclass(slots=True)
class Session:
    """Everything seen while one configuration ran."""

    name: str
    engines: tuple[str, ...]
    runs: list[list[PhaseRun]] = field(default_factory=list)
    alone_tokens_per_s: list[float] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    ledger_before: LedgerFigures | None = None
    ledger_loaded: LedgerFigures | None = None
    ledger_after: LedgerFigures | None = None
    physical_after: tuple[int, ...] = ()

    def results(self) -> list[Result]:
        return [result for run in self.runs for phase in run for result in phase.results]

    def first_run(self) -> list[Result]:
        return [result for phase in self.runs[0] for result in phase.results]

    def phase(self, name: str) -> list[PhaseRun]:
        """The phase of that name in every run."""
        return [phase for run in self.runs for phase in run if phase.phase == name]

    def preemptions(self) -> int:
        return sum(sum(phase.preemptions.values()) for run in self.runs for phase in run)


def tokens_per_s(results: Sequence[Result]) -> float:
    """Generated tokens a second, from the first request sent to the last token; 0 without any."""
    ends = [result.last_s for result in results if result.last_s is not None]
    if not ends:
        return 0.0
    seconds = max(ends) - min(result.sent_s for result in results)
    return sum(len(result.tokens) for result in results) / seconds


def latency(values: Iterable[float | None]) -> dict[str, float]:
    """Mean, median and p99 in the unit given; empty without values."""
    known = [value for value in values if value is not None]
    if not known:
        return {}
    return {
        "mean": round(statistics.fmean(known), 1),
        "p50": round(percentile(known, 50), 1),
        "p99": round(percentile(known, 99), 1),
    }


def median_of(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median over runs of each figure by itself."""
    keys = figures[0].keys() if figures else ()
    return {key: round(statistics.median(run[key] for run in figures), 1) for key in keys}


def session_figures(session: Session, windows_s: dict[str, float]) -> dict[str, object]:
    """The part of report.json about one configuration. ``windows_s``: see ``burst_windows``."""
    whole = [[r for phase in run for r in phase.results] for run in session.runs]
    return {
        "requests_total": len(session.results()),
        "requests_failed": sum(not result.ok for result in session.results()),
        "preemptions": session.preemptions(),
        "ttft_ms": median_of([latency(r.ttft_ms for r in run) for run in whole]),
        "tpot_ms": median_of([latency(r.tpot_ms for r in run) for run in whole]),
        "phases": {name: _phase_figures(session.phase(name), windows_s[name]) for name in PHASES},
    }


def _phase_figures(phases: Sequence[PhaseRun], window_s: float) -> dict[str, object]:
    return {
        "requests": len(phases[0].results),
        "seconds": round(statistics.median(phase.seconds for phase in phases), 2),
        "window_s": round(window_s, 2),
        "finished_in_window": statistics.median(p.finished_within(window_s) for p in phases),
        "preemptions": {
            name: sum(phase.preemptions[name] for phase in phases) for name in phases[0].preemptions
        },
        "ttft_ms": median_of([latency(r.ttft_ms for r in p.results) for p in phases]),
        "tpot_ms": median_of([latency(r.tpot_ms for r in p.results) for p in phases]),
        "ttft_p99_ms_of_runs": [latency(r.ttft_ms for r in p.results)["p99"] for p in phases],
    }


def burst_windows(first: Session, second: Session) -> dict[str, float]:
    """For each phase the time in which the faster of two configurations finished it (median)."""
    return {
        name: min(
            statistics.median(phase.seconds for phase in session.phase(name))
            for session in (first, second)
        )
        for name in PHASES
    }
