"""``benchmarks/gpu/pairs.py``: who answers what when, and what is made of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"))

import pairs
import performance
import workloads


def test_all_warm_up_and_then_the_two_of_a_pair_answer_the_same_right_after_each_other() -> None:
    schedule = pairs.Schedule(("paced", "short"), engines=2, rounds=3)
    turns = list(schedule.turns())
    warm, rest = turns[:8], turns[8:]
    assert {(side, index) for side, index, _ in warm} == {
        (side, index) for side in pairs.SIDES for index in (0, 1)
    }
    assert all(name.endswith("-0") for _, _, name in warm)
    first = []
    for one, other in zip(rest[::2], rest[1::2], strict=True):
        assert one[1:] == other[1:] and {one[0], other[0]} == set(pairs.SIDES)
        first.append(one[0])
    assert first.count("plain") == first.count("kvcached") == 6, "either is first as often"
    assert len({name for _, _, name in rest}) == 12, "each pair has requests of its own"


def test_an_engine_does_its_parts_in_the_order_of_the_turns() -> None:
    schedule = pairs.Schedule(("paced", "short"), engines=2, rounds=3)
    for index in (0, 1):
        for side in pairs.SIDES:
            turns = [name for who, which, name in schedule.turns() if (who, which) == (side, index)]
            assert tuple(turns) == schedule.parts(index)
            assert all(workloads.is_numbered(name) for name in turns)


def test_each_work_that_comes_over_and_over_has_words_on_the_page() -> None:
    assert set(performance.NUMBERED) == {"paced", *workloads.BURSTS}


def test_other_work_is_not_numbered() -> None:
    names = [*workloads.WORK, "point-3", "sleep-1", "verdict", "paced-", "short-again"]
    assert not [name for name in names if workloads.is_numbered(name)]


def work(tpot_ms: float, tokens_per_s: float) -> dict[str, Any]:
    each = [[0.0, 0.05, tpot_ms / 1e3], None, [0.0, 0.07, 2 * tpot_ms / 1e3]]
    return {
        "each": each,
        "output_tokens_per_s": tokens_per_s,
        "commands": [[9.0, 0.002, 0.0, 1.0, 0.0]],
    }


def results(done: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {"work": works} for name, works in done.items()}


def test_ratios_are_of_pairs_that_both_sides_have_answered() -> None:
    schedule = pairs.Schedule(("paced",), engines=1, rounds=3)
    found = pairs.summary(
        results(
            {
                "plain-0": {
                    "paced-1": work(7, 100),
                    "paced-2": work(8, 100),
                    "paced-3": work(1, 1),
                },
                "kvcached-0": {"paced-1": work(7.7, 99), "paced-2": work(8, 101)},
            }
        ),
        schedule,
    )["paced"]
    assert [one["first"] for one in found["pairs"]] == ["plain", "kvcached"]
    assert found["of_plain"]["tpot_p99_ms"]["least"] == pytest.approx(1.0)
    assert found["of_plain"]["tpot_p99_ms"]["most"] == pytest.approx(1.1)
    assert found["pairs"][0]["kvcached"]["answers"] == 2
    assert found["pairs"][0]["kvcached"]["waited_for_pages_ms"] == pytest.approx(2.0)
    assert found["together_tpot_ms"]["plain"]["p99"] == pytest.approx(16.0)
    assert pairs.summary(results({"plain-0": {}, "kvcached-0": {}}), schedule) == {}


def test_the_page_has_a_row_for_each_figure_and_what_the_work_is_about_first() -> None:
    schedule = pairs.Schedule(("paced", "short"), engines=1, rounds=1)
    done = {
        "plain-0": {"paced-1": work(7, 100), "short-1": work(10, 200)},
        "kvcached-0": {"paced-1": work(7.7, 100), "short-1": work(10, 199)},
    }
    works = pairs.summary(results(done), schedule)
    text = performance.pairs(
        {
            "works": works,
            "figures": {name: pairs.figure(name) for name in works},
            "engines": 1,
            "shape": "8b",
            "runner": "V2",
            "prefix_caching": True,
            "compiled": False,
        }
    )
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    paced, short = (performance.NUMBERED[name] for name in ("paced", "short"))
    assert rows[0] == f"| {paced} | TPOT p99, ms | 1 | 14.00 | 15.40 | 1.1000 | 1.1000 | 1.1000 |"
    assert f"| {short} | tokens/s | 1 | 200 | 199 | 0.9950 | 0.9950 | 0.9950 |" in rows
    assert len(rows) == 3 + 4, "of paced requests as many tokens come as arrive"
    assert "with prefix caching, prompts kernel by kernel" in text
    assert "0.9950" in pairs.table(works)
