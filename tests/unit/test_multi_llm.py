"""Arrivals, figures and skipping of the benchmark of several models; no engine is started."""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kvcached.bench import pictures
from kvcached.bench.share_load import Arrival, read_trace

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"))

import arrivals
import fleet
import multi_llm_report as report
import points
import sweep
import throughput
from arrivals import Lengths, Peaks
from multi_llm_report import Slo
from multi_llm_stage import DRAIN_S, END_S, LEAD_S, Memory, Side, Stage

PEAKS = Peaks(models=3, base=0.5, peak=16.0, width_s=12.0)
EVEN = [Arrival(float(i), 100 + i, 10 + i) for i in range(50)]


def made(rates: list[float], **changes: Any) -> dict[str, Any]:
    options = {"seed": 1, "vocabulary": 1000, "give_up_s": 5.0} | changes
    return arrivals.plan(rates, PEAKS, read_trace(None), Lengths(), **options)


@pytest.mark.parametrize("model", [0, 1, 2])
def test_the_integral_is_that_of_the_rate(model: int) -> None:
    steps = 36_000
    for until_s in (0.0, 5.0, 13.0, 18.0, 23.5, 36.0):
        step = until_s / steps
        summed = sum(PEAKS.rate(model, (i + 0.5) * step) for i in range(steps)) * step
        assert PEAKS.integral(model, until_s) == pytest.approx(summed, rel=1e-4, abs=1e-6)


def test_each_model_has_its_peak_in_turn() -> None:
    assert [PEAKS.rate(m, 6.0) for m in range(3)] == [16.0, 0.5, 0.5]
    assert [PEAKS.rate(m, 18.0) for m in range(3)] == [0.5, 16.0, 0.5]
    assert PEAKS.window(2) == (24.0, 36.0) and PEAKS.span_s == 36.0


def test_an_even_trace_arrives_as_the_rate_says() -> None:
    at = list(arrivals.times(PEAKS, 1, iter([1.0] * 1000)))
    assert len(at) == 110, "the 111th is due when the peaks are over"
    for number, at_s in enumerate(at):
        assert PEAKS.integral(1, at_s) == pytest.approx(number + 1, abs=1e-3)
    assert at == sorted(at) and at[-1] <= PEAKS.span_s


def test_rows_keep_their_order_and_lengths() -> None:
    models, beginnings = arrivals.schedule(PEAKS, EVEN, Lengths(prompt_max=140), "7")
    assert [len(each) for each in beginnings] == [len(asks) for asks in models]
    assert not any(map(any, beginnings)), "this trace names none"
    for asks in models:
        rows = [int(answer) - 10 for _, _, answer in asks]
        assert all((b - a) % 50 == 1 for a, b in itertools.pairwise(rows))
        assert all(
            prompt == min(140, 100 + row) for (_, prompt, _), row in zip(asks, rows, strict=True)
        )
    assert models[0][0][1:] != models[1][0][1:]


def test_a_real_trace_keeps_its_rhythm_and_repeats_for_a_seed() -> None:
    plan = made([16.0, 8.0])
    assert plan == json.loads(json.dumps(plan)) == made([16.0, 8.0])
    assert plan["points"]["16/s"] != made([16.0], seed=2)["points"]["16/s"]
    assert made([8.0])["points"]["8/s"] == plan["points"]["8/s"], "a point depends on no other"
    at = [ask[0] for ask in plan["points"]["16/s"]["models"][0]]
    assert 60 < len(at) < 160
    assert sum(at_s <= 12.0 for at_s in at) > 0.75 * len(at)
    gaps = {round(b - a, 3) for a, b in itertools.pairwise(at)}
    assert len(gaps) > 20, "an even clock would have few"


def test_lengths_may_be_fixed() -> None:
    assert Lengths(prompt=256, output=128).of(EVEN[3]) == (256, 128)
    assert Lengths(divisor=2.0).of(EVEN[20]) == (60, 15)
    assert Lengths(divisor=100.0).of(EVEN[20]) == (16, 8)


NAMED = [Arrival(float(i), 1024 + i, 40, (7, i % 3, 90 + i)) for i in range(50)]


def test_names_of_a_trace_become_equal_beginnings() -> None:
    lengths = Lengths(divisor=4.0, answer_divisor=1.0)
    plan = arrivals.plan([6.0], PEAKS, NAMED, lengths, seed=1, vocabulary=1000, give_up_s=1.0)
    assert plan["prefix_tokens"] == 128
    asks = points.point_asks(plan, "6/s", 1)
    names = plan["points"]["6/s"]["prefixes"][1]
    assert asks == points.point_asks(json.loads(json.dumps(plan)), "6/s", 1)
    assert {len(ask.prompt) for ask in asks} <= set(range(256, 270)) and asks[0].max_tokens == 40
    shared = 0
    for (one, its), (other, theirs) in itertools.pairwise(zip(asks, names, strict=True)):
        equal = sum(1 for _ in itertools.takewhile(lambda p: p[0] == p[1], zip(its, theirs)))  # noqa: B905
        least = min(128 * equal, len(one.prompt), len(other.prompt))
        assert one.prompt[:least] == other.prompt[:least]
        assert one.prompt[: least + 8] != other.prompt[: least + 8]
        shared += equal
    assert shared >= len(asks) - 1, "all begin with the same name"
    assert asks[0].prompt[:128] != points.point_asks(plan, "6/s", 2)[0].prompt[:128]


def test_a_prompt_that_is_cut_has_no_names_for_what_is_gone() -> None:
    row = Arrival(0.0, 2000, 10, (1, 2, 3, 4))
    assert Lengths(divisor=4.0).prefixes(row) == [1, 2, 3, 4]
    assert Lengths(divisor=4.0, prompt_max=130).prefixes(row) == [1, 2]
    assert Lengths(prompt=256, output=8).prefixes(row) == []


def test_a_spread_has_the_nearest_rank() -> None:
    assert arrivals.spread([3.0, 1.0, 2.0]) == {"mean": 2.0, "p50": 2.0, "p99": 3.0}
    assert arrivals.spread([float(i) for i in range(1, 201)])["p99"] == 198.0
    assert arrivals.spread([]) == {}


ASKS = [[0.0, 100, 4], [1.0, 100, 4], [13.0, 100, 4], [2.0, 100, 1]]
ROWS = [[0.1, 0.4, 0.02, 4], None, [0.0, 2.0, 0.02, 3], [0.0, 0.5, 0.0, 1]]


def test_figures_count_lateness_and_what_did_not_end() -> None:
    found = report.figures(ROWS, ASKS, Slo(1.0, 0.05), 10.0)
    assert (found["requests"], found["unfinished"], found["wrong_length"]) == (4, 1, 1)
    assert found["ttft_s"]["p50"] == 0.5 and found["ttft_s"]["p99"] == 2.0
    assert found["tpot_s"]["mean"] == 0.02, "an answer of one token has no time between tokens"
    assert found["slo"] == 0.5 and found["goodput_per_s"] == 0.2
    assert found["output_tokens_per_s"] == 0.8


def point(rows: list[Any]) -> dict[str, Any]:
    result = {
        "seconds": 10.0,
        "each": rows,
        "num_preemptions": 2.0,
        "prefix_cache_hits": 1.0,
        "prefix_cache_queries": 4.0,
        "forgotten": True,
    }
    load = {"models": [ASKS, ASKS], "peaks": {"width_s": 12.0}}
    return report.point_figures([result, result], load, Slo(1.0, 0.05))


def test_a_point_tells_peaks_from_the_rest() -> None:
    found = point(ROWS)
    assert found["all"]["requests"] == 8
    assert found["peaks"]["requests"] == 4, "three in the first model's peak, one in the second's"
    assert found["model 1"]["requests"] == 4
    assert found["hit_rate"] == [0.25, 0.25] and found["preemptions"] == [2.0, 2.0]


def told(static: dict[str, Any], elastic: dict[str, Any]) -> dict[str, Any]:
    sides = {
        "static": {"points": static, "skipped": {}},
        "elastic": {"points": elastic, "skipped": {"24/s": "no time"}},
    }
    return {"sides": sides, "comparison": report.comparison(sides)}


def test_the_table_names_the_best_and_the_worst_point() -> None:
    fast, slow = point(ROWS), point([[0.0, 8.0, 0.02, 4], *ROWS[1:]])
    compared = told({"8/s": fast, "16/s": slow, "24/s": slow}, {"8/s": fast, "16/s": fast})
    assert {one["point"] for one in compared["comparison"]} == {"8/s", "16/s"}
    found = report.extremes(compared["comparison"], "ttft_s_mean")
    assert found["worst"] == {"point": "8/s", "ratio": 1.0}
    assert found["best"]["ratio"] == pytest.approx((8.0 + 2.0 + 0.5) / (0.5 + 2.0 + 0.5))
    text = report.table(compared)
    assert "TTFT mean, static over elastic, all: best 3.50 at 16/s, worst 1.00 at 8/s" in text
    assert "not run: elastic 24/s: no time" in text
    assert text.count("24/s     all") == 1, "the static side alone has it"


def test_elastic_is_compared_with_turns_too() -> None:
    fast, slow = point(ROWS), point([[0.0, 8.0, 0.02, 4], *ROWS[1:]])
    sides = {
        name: {"points": {"8/s": one}, "skipped": {}}
        for name, one in (("static", fast), ("elastic", fast), ("swap", slow))
    }
    compared = {"sides": sides, "comparison": report.comparison(sides)}
    text = report.table(compared)
    assert "TTFT mean, static over elastic, all: best 1.00 at 8/s" in text
    assert "TTFT mean, one at a time over elastic, all: best 3.50 at 8/s" in text
    assert {one["against"] for one in compared["comparison"]} == {"static", "swap"}


def test_gpus_of_a_sweep_take_what_is_next(tmp_path: Path) -> None:
    first, second = sweep.numbers(tmp_path / "next"), sweep.numbers(tmp_path / "next")
    assert [next(first), next(second), next(second), next(first)] == [0, 1, 2, 3]
    parts = [tuple(each.split(":")) for each in sweep.PLAY]
    assert all(part in sweep.PARTS and side in report.SIDES for part, side in parts)
    for part in {part for part, _ in parts}:
        assert {(part, "static"), (part, "elastic")} <= set(parts), "nothing is left alone"


def test_both_sides_are_drawn(tmp_path: Path) -> None:
    fast, nothing = point(ROWS), point([None] * 4)
    path = tmp_path / "picture.png"
    pictures.multi_llm(told({"8/s": fast, "16/s": nothing}, {"8/s": fast, "16/s": fast}), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_point_at_which_nothing_ended_is_said() -> None:
    nothing = point([None] * 4)
    compared = told({"8/s": nothing}, {"8/s": point(ROWS)})
    assert "nothing ended" in report.table(compared)
    assert report.extremes(compared["comparison"], "ttft_s_p99") == {}


def test_points_without_time_are_skipped_on_both_sides(tmp_path: Path) -> None:
    plan = made([16.0, 8.0])
    limit_s = time.monotonic() - fleet.STARTED + 200.0
    stage = Stage(fleet.Fleet(tmp_path), plan, limit_s, False, "host:x", Slo(1.0, 0.05))
    first = Side("static", (), Memory(None), start_s=30.0)
    expected = LEAD_S + 36.0 + DRAIN_S
    room = 200.0 - 2 * END_S - first.start_s - 2 * expected
    assert room > 0 and stage._why_not(first, None, "16/s") == ""
    first.took_s["16/s"] = room + 1.0  # the other side will need as long
    assert "s are left" in stage._why_not(first, None, "8/s")
    second = Side("elastic", (), Memory(None))
    assert stage._why_not(second, first, "16/s") == ""
    assert stage._why_not(second, first, "8/s") == "static has not run it"


def test_overhead_is_of_pairs_with_their_spread() -> None:
    def run(speed: float, long: float) -> dict[str, Any]:
        work = {"output_tokens_per_s": speed, "tpot_p50_s": 0.01, "tpot_p99_s": 0.01}
        return {
            "ok": True,
            "work": {
                "throughput": work | {"ttft_p99_s": 1.0},
                "long": {"output_tokens_per_s": long},
            },
            "used_idle_bytes": 0,
            "used_end_bytes": 0,
            "preemptions": 0,
        }

    results = {
        "v2-plain-0": run(100.0, 50.0),
        "v2-kvcached-0": run(99.0, 50.0),
        "v2-kvcached-1": run(208.0, 49.0),
        "v2-plain-1": run(200.0, 50.0),
    }
    found = throughput.summary(results, "V2", ["plain", "kvcached"])["kinds"]["kvcached"]
    assert found["pairs_of_plain"] == pytest.approx({"median": 1.015, "least": 0.99, "most": 1.04})
    assert found["long_of_plain"] == pytest.approx({"median": 0.99, "least": 0.98, "most": 1.0})
    assert "short_of_plain" not in found
    text = throughput.table([throughput.summary(results, "V2", ["plain", "kvcached"])])
    assert "long: 0.9900 of plain's tokens/s (0.9800 to 1.0000)" in text
