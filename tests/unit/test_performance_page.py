"""The tables of docs/performance.md are what the kept results make of it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(name: str) -> ModuleType:
    path = ROOT / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


performance, record = load("performance"), load("record")


def test_the_page_is_what_the_results_make_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["performance.py", "--check"])
    assert performance.main() == 0, "run benchmarks/performance.py"


def test_every_kept_result_says_where_it_comes_from() -> None:
    kept = sorted(performance.RESULTS.glob("*.json"))
    assert kept
    for path in kept:
        one = json.loads(path.read_text())
        assert all(one[key] for key in record.HEADING), path
        assert one["result"]["benchmark"] in performance.MAKERS, path


def test_only_what_is_made_is_replaced() -> None:
    text = f"before\n{performance.BEGIN}\nold\n{performance.END}\nafter\n"
    changed = performance.page(text, "new")
    assert changed == f"before\n{performance.BEGIN}\n\nnew\n{performance.END}\nafter\n"
    assert performance.page(changed, "new") == changed
    with pytest.raises(ValueError, match="lacks"):
        performance.page("before\n", "new")


def test_a_section_names_machine_versions_command_and_date(tmp_path: Path) -> None:
    told = {
        "benchmark": "elasticity",
        "backend": "host",
        "page_bytes": 2 << 20,
        "pages": 8,
        "rounds": 3,
        "rest_pages": 2,
        "open_ms": 1.5,
        "first_blocks_ms": 0.1,
        "grow_ms": 2.5,
        "grow_slowest_ms": 3.5,
        "grow_gib_per_s": 4.5,
        "shrink_ms": 5.5,
        "shrink_slowest_ms": 6.5,
        "shrink_gib_per_s": 7.5,
    }
    wrapped = record.wrap(told, ["kvcached", "bench", "elasticity"], {"machine": "two cores"})
    (tmp_path / "grow.json").write_text(json.dumps(wrapped))
    text = performance.made(tmp_path)
    for part in ("two cores", "python 3", wrapped["date"], "`kvcached bench elasticity`"):
        assert part in text
    assert "| grow by the others | 2.5 | 3.5 | 4.5 |" in text


def test_what_a_result_says_of_itself_counts_and_what_one_is_told_more() -> None:
    told = {"benchmark": "scale", "machine": "H100", "date": "2026-01-02", "runs": []}
    wrapped = record.wrap(told, [], {})
    assert (wrapped["machine"], wrapped["date"]) == ("H100", "2026-01-02")
    assert wrapped["result"] == {"benchmark": "scale", "runs": []}
    assert record.wrap(told, [], {"machine": "another"})["machine"] == "another"


def test_a_command_runs_and_its_result_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    said = json.dumps({"benchmark": "scale", "runs": [1]})
    command = ["record.py", "one", "--machine", "m", "--", "echo", said]
    monkeypatch.setattr(sys, "argv", command)
    assert record.main() == 0
    monkeypatch.setattr(sys, "argv", [*command[:2], "--append", *command[2:]])
    assert record.main() == 0
    kept = json.loads((tmp_path / "one.json").read_text())
    assert kept["machine"] == "m" and kept["command"].count("echo") == 2
    assert kept["result"]["runs"] == [1, 1]


def test_rows_of_requests_are_not_kept() -> None:
    point = {"all": {"slo": 1.0}, "requests": [[[0.0, 0.1, 0.1, 5]]]}
    side = {"points": {"8/s": point}, "memory": [{}], "engines": {}, "start_s": 3.0}
    told = {"benchmark": "multi_llm", "plan": {}, "kv_bytes": 5, "sides": {"static": side}}
    kept = record.wrap(told, [], {})["result"]
    assert kept["kv_bytes"] == 5 and "plan" not in kept
    assert kept["sides"] == {"static": {"points": {"8/s": {"all": {"slo": 1.0}}}, "start_s": 3.0}}


def test_runs_are_added_only_to_runs_of_the_same_kind() -> None:
    first, more = (
        record.wrap({"benchmark": "fragmentation", "hours": 1.0, "runs": [run]}, [command], {})
        for run, command in ((1, "a"), (2, "b"))
    )
    both = record.append(first, more)
    assert both["result"]["runs"] == [1, 2] and both["command"] == "a; b"
    more["result"]["hours"] = 2.0
    with pytest.raises(ValueError, match="hours"):
        record.append(first, more)
    with pytest.raises(ValueError, match="machine"):
        record.append(first, {**more, "machine": "another"})


def test_runs_become_rows(tmp_path: Path) -> None:
    def run(mode: str, page_mib: int, ratio: float) -> dict[str, object]:
        ratios = {"of_sums": ratio, "p99": 2 * ratio}
        return {"mode": mode, "at_once": 32, "page_mib": page_mib, "ratio": ratios}

    runs = [run("steady", 4, 1.01), run("steady", 32, 1.07), run("day", 32, 1.13)]
    text = performance.fragmentation({"hours": 24.0, "runs": runs})
    assert "| always so many requests | 32 | 1.010 (2.02) | 1.070 (2.14) |" in text
    assert "| arrivals of a day | 32 |  | 1.130 (2.26) |" in text
    sides = [
        {"side": side, "gpus": gpus, "slo": slo}
        for side, gpus, slo in (("elastic", 3, 0.995), ("even", 3, 0.7), ("load", 3, 0.8))
    ]
    fleet = {
        "models": 18,
        "mix": ["8b"],
        "requests": 5,
        "minutes": 1,
        "slo": {"ttft_s": 1.0, "tpot_s": 0.1, "part": 0.99},
        "needed": {"elastic": 3, "even": None, "load": None},
        "runs": sides,
    }
    made = performance.simulate(fleet)
    assert "| one KV budget a GPU | 3 | 99.50% |" in made
    assert "| equal parts | more than 3 | 70.00% |" in made


def test_an_engine_beside_a_plain_one_has_a_row_for_each_work() -> None:
    def ratio(median: float) -> dict[str, float]:
        return {"median": median, "least": median - 0.01, "most": median + 0.01}

    plain = {"tokens_per_s": [100.0, 102.0], "short_tokens_per_s": [200.0, 204.0]}
    ours = {"tokens_per_s": [99.0, 100.0], "short_tokens_per_s": [198.0, 202.0]}
    plain["paced_tpot_p99_ms"], ours["paced_tpot_p99_ms"] = [7.0, 8.0], [7.5, 7.7, 7.9]
    told = {"pairs_of_plain": ratio(0.985), "short_of_plain": ratio(0.99)}
    told["paced_tpot_p99_of_plain"] = ratio(1.02)
    result = {
        "shape": "8b",
        "prefix_caching": True,
        "summaries": [{"runner": "V2", "kinds": {"plain": plain, "kvcached": {**ours, **told}}}],
    }
    text = performance.overhead(result)
    assert "with prefix caching" in text
    assert "| V2 kvcached | 200 requests at once, 1024 tokens in, 512 out | 2 | 101 | 100 |" in text
    assert "| 2 | 202 | 200 | 0.9900 | 0.9800 | 1.0000 |" in text
    assert "| 2 | 7.50 | 7.70 | 1.0200 | 1.0100 | 1.0300 |" in text, "a run without its pair"
    del told["pairs_of_plain"]  # as throughput.py does with --contexts-alone
    kinds = {"plain": plain, "kvcached": {**ours, **told}}
    result["summaries"] = [{"runner": "V2", "kinds": kinds}]
    assert "1024 tokens in" not in performance.overhead(result), "short contexts were all there was"


def test_how_soon_memory_comes_has_a_row_for_each_kind_that_was_played() -> None:
    spread = {"p50": 3.0, "p99": 6.0, "max": 7.0}
    figures = {
        "rounds": 20,
        "demand_to_lease_ms": spread,
        "ttft_ms": spread,
        "ttft_alone_ms": spread,
        "ttft_ratio": 1.04,
    }
    result = {
        "instances": 4,
        "model": "m",
        "budget_bytes": 1 << 30,
        "request_bytes": 256 << 20,
        "idle": figures,
    }
    text = performance.reclaim(result)
    assert "4 engines of m share 1024 MiB, 256.0 MiB a request" in text
    assert "| at rest | 20 | 3.0 / 6.0 / 7.0 |  | 3.0 / 6.0 / 7.0 |" in text
    assert "at work" not in text
    result["busy"] = {**figures, "lease_past_step_ms": spread}
    assert "| at work | 20 | 3.0 / 6.0 / 7.0 | 3.0 / 6.0 / 7.0 |" in performance.reclaim(result)
