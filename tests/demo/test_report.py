"""The verdict: what fails a demo, and that a report, its picture and its tables can be made."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

from rich.console import Console

from kvcached.cli.accounts import AccountFigures, LedgerFigures
from kvcached.demo.compare import Comparison, Difference, compare
from kvcached.demo.figures import PhaseRun, Session, tokens_per_s
from kvcached.demo.load import Result
from kvcached.demo.models import Model
from kvcached.demo.plot import draw_memory
from kvcached.demo.report import Outcome, build_report, print_report, write_report
from kvcached.demo.sampler import Sample
from kvcached.demo.setups import Options
from kvcached.demo.trace import PHASES, Request
from kvcached.units import MIB

MODEL = Model("tiny", Path("tiny"), layers=2, kv_heads=2, head_dim=8, vocab=100)
BUDGET = 64 * MIB


def _session(name: str, ttft_s: float, peak_bytes: int = 0) -> Session:
    runs = [[]]
    for index, phase in enumerate(PHASES):
        start_s = 10.0 * index
        request = Request(index, phase, "A", 0.0, (1, 2), 2)
        result = Result(request, start_s, start_s + ttft_s, start_s + ttft_s + 1, [7, 8])
        runs[0].append(PhaseRun(phase, start_s, start_s + 5, [result], {"A": 1, "B": 0}))
    accounts = tuple(
        AccountFigures(engine, 3, 3, 1, 1, 1, 0, MIB, MIB, 4, 5 * MIB) for engine in "AB"
    )
    ledger = LedgerFigures(BUDGET, peak_bytes, accounts)
    return Session(
        name,
        ("A", "B"),
        runs,
        alone_tokens_per_s=[90.0 if name == "elastic" else 100.0],
        samples=[Sample(at / 10, (peak_bytes // 2, peak_bytes // 2)) for at in range(300)],
        ledger_after=ledger,
        physical_after=(2 * MIB, 2 * MIB),
    )


def _outcome(comparison: Comparison, peak_bytes: int = BUDGET) -> Outcome:
    return Outcome(
        Options(Path("out"), BUDGET),
        {"A": MODEL, "B": MODEL},
        _session("elastic", 1.0, peak_bytes),
        _session("static", 3.0),
        _session("reference", 1.0),
        comparison,
        12.0,
    )


def test_a_good_run() -> None:
    report = build_report(_outcome(Comparison(3, ())))
    assert report["failures"] == []
    assert report["requests_total"] == 3 and report["requests_failed"] == 0
    assert report["outputs_equal"] is True
    assert report["budget_bytes"] == report["physical_peak_bytes"] == BUDGET
    assert report["physical_after_bytes"] == 4 * MIB
    assert report["pinned_bytes"] == 2 * MIB and report["reclaimed_bytes"] == 10 * MIB
    assert report["after_load"]["B"] == {
        "physical_bytes": 2 * MIB,
        "pinned_bytes": MIB,
        "page_bytes": MIB,
        "allowed_bytes": 2 * MIB,
    }
    assert report["elastic"]["ttft_ms"]["p99"] == 1000
    assert report["static"]["ttft_ms"]["mean"] == 3000
    assert report["ttft_p99_static_over_elastic"] == dict.fromkeys(PHASES, 3.0)
    assert report["overhead_vs_plain"] == 0.9
    assert len(report["overhead_pairs"]) == 1
    assert json.loads(json.dumps(report)) == report


def test_what_fails_a_run() -> None:
    wrong = Difference("A", 1, 0, 5, 6, 0.5)
    assert any("differ" in f for f in build_report(_outcome(Comparison(3, (wrong,))))["failures"])
    over = build_report(_outcome(Comparison(3, ()), BUDGET + 4096))["failures"]
    assert len(over) == 2
    assert any("not elastic" in f for f in build_report(_outcome(Comparison(3, ()), 0))["failures"])
    outcome = _outcome(Comparison(3, ()))
    outcome.static.runs[0][0].results[0].error = "HTTP 500"
    assert any("static" in f for f in build_report(outcome)["failures"])


def _failures(outcome: Outcome) -> str:
    return "; ".join(build_report(outcome)["failures"])


def test_a_run_that_proves_nothing_fails() -> None:
    outcome = _outcome(Comparison(3, ()))
    for phase in outcome.elastic.runs[0]:
        phase.preemptions = {"A": 0, "B": 0}
    assert "preempted" in _failures(outcome)
    outcome = _outcome(Comparison(3, ()))
    assert outcome.elastic.ledger_after
    accounts = outcome.elastic.ledger_after.accounts
    idle = tuple(dataclasses.replace(account, reclaimed=0) for account in accounts)
    outcome.elastic.ledger_after = LedgerFigures(BUDGET, BUDGET, idle)
    assert "reclaimed" in _failures(outcome)


def test_memory_that_an_engine_keeps_fails_a_run() -> None:
    outcome = _outcome(Comparison(3, ()))
    outcome.elastic.physical_after = (2 * MIB, 2 * MIB + 4096)
    assert "engine B still holds" in _failures(outcome)
    outcome.elastic.ledger_after = None  # nobody says what may be held
    assert "engine A still holds" in _failures(outcome)


def test_speed_counts_from_the_first_request_to_the_last_token() -> None:
    request = Request(0, PHASES[0], "A", 0.0, (1,), 2)
    results = [Result(request, 1.0, 2.0, 3.0, [1, 2]), Result(request, 1.5, 2.0, 5.0, [1, 2])]
    assert tokens_per_s(results) == 1.0
    assert tokens_per_s([Result(request)]) == 0.0


def test_a_tie_is_the_only_excuse() -> None:
    tie = Difference("A", 1, 0, 5, 6, 3e-5)
    assert tie.is_tie and Comparison(3, (tie,)).equal
    assert not Difference("A", 1, 0, 5, 6, None).is_tie
    assert not Comparison(0, ()).equal


def test_equal_results_need_no_engine() -> None:
    results = _session("elastic", 1.0).results()
    assert compare(results, _session("reference", 2.0).results(), {}) == Comparison(3, ())


def test_screen_file_and_picture(tmp_path: Path) -> None:
    outcome = _outcome(Comparison(3, ()))
    report = build_report(outcome)
    write_report(report, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == report
    text = io.StringIO()
    print_report(report, Console(file=text, width=160), tmp_path)
    assert "3.00 x" in text.getvalue() and "OK" in text.getvalue()
    names = {"A": "tiny", "B": "tiny"}
    picture = tmp_path / "memory.png"
    draw_memory(outcome.elastic, outcome.static, BUDGET, names, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
