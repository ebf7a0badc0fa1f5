"""The demo's load: the bundled slice, its scaling, and the figures made from results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kvcached.demo.figures import PhaseRun, Session, burst_windows, latency
from kvcached.demo.load import Result
from kvcached.demo.models import Model
from kvcached.demo.percentiles import percentile
from kvcached.demo.setups import BLOCK_TOKENS, DEFAULT_BUDGET, MAX_MODEL_TOKENS
from kvcached.demo.trace import PHASES, LoadShape, Request, make_load, read_slice

MODELS = {
    "A": Model("a", Path("a"), layers=30, kv_heads=3, head_dim=64, vocab=49152),
    "B": Model("b", Path("b"), layers=8, kv_heads=4, head_dim=64, vocab=49152),
}


def test_the_slice_is_in_order_and_attributed() -> None:
    rows = read_slice()
    assert len(rows) == 600
    assert rows[0].at_s == 0
    assert all(a.at_s <= b.at_s for a, b in zip(rows, rows[1:], strict=False))  # noqa: RUF007
    package = Path(__file__).parents[2] / "src" / "kvcached" / "demo" / "data"
    attribution = (package / "ATTRIBUTION.md").read_text()
    assert "CC-BY 4.0" in attribution and "Splitwise" in attribution


def test_the_load_is_the_same_every_time_and_large_enough() -> None:
    load = make_load(LoadShape(), MODELS)
    assert load == make_load(LoadShape(), MODELS)
    assert len(load) == LoadShape().total >= 200
    assert [request.id for request in load] == list(range(len(load)))


def test_the_load_keeps_its_bounds() -> None:
    shape = LoadShape()
    for request in make_load(shape, MODELS):
        assert shape.prompt_min <= len(request.prompt) <= shape.prompt_max
        assert shape.output_min <= request.max_tokens <= shape.output_max
        assert len(request.prompt) + request.max_tokens <= MAX_MODEL_TOKENS
        assert max(request.prompt) < MODELS[request.engine].vocab
        assert (
            0 <= request.at_s <= max(shape.burst_a_span_s, shape.burst_b_span_s, shape.both_span_s)
        )


def test_one_engine_rests_in_each_burst() -> None:
    load = make_load(LoadShape(), MODELS)
    engines = {phase: {r.engine for r in load if r.phase == phase} for phase in PHASES}
    assert engines == {"burst-a": {"A"}, "burst-b": {"B"}, "both": {"A", "B"}}


def test_prompts_of_an_engine_share_a_prefix_and_nothing_more() -> None:
    shape = LoadShape()
    prompts = [r.prompt for r in make_load(shape, MODELS) if r.engine == "A"]
    prefix = shape.shared_prefix
    assert prefix % BLOCK_TOKENS == 0
    assert len({prompt[:prefix] for prompt in prompts}) == 1
    assert len({prompt[prefix : prefix + 8] for prompt in prompts}) == len(prompts)


@pytest.mark.parametrize(("phase", "engine"), [("burst-a", "A"), ("burst-b", "B")])
def test_the_prompts_of_a_burst_fit_the_budget_but_not_its_half(phase: str, engine: str) -> None:
    shape = LoadShape()
    load = [r for r in make_load(shape, MODELS) if r.phase == phase]
    blocks = sum(-(-(len(r.prompt) - shape.shared_prefix) // BLOCK_TOKENS) for r in load)
    need_bytes = blocks * BLOCK_TOKENS * MODELS[engine].token_bytes
    assert 1.2 * DEFAULT_BUDGET / 2 < need_bytes < DEFAULT_BUDGET


def test_percentile_is_the_nearest_rank() -> None:
    values = [float(value) for value in range(1, 101)]
    assert percentile(values, 99) == 99
    assert percentile(values, 50) == 50
    assert percentile([3.0], 99) == 3.0
    assert latency([None, 10.0, 20.0]) == {"mean": 15.0, "p50": 10.0, "p99": 20.0}
    assert latency([None]) == {}


def _result(sent_s: float, first_s: float, last_s: float, tokens: int = 3) -> Result:
    request = Request(0, "burst-a", "A", 0.0, (1, 2), 3)
    return Result(request, sent_s, first_s, last_s, list(range(tokens)))


def test_a_result_counts_only_with_all_its_tokens() -> None:
    good = _result(1.0, 1.5, 2.5)
    assert good.ok and good.ttft_ms == 500 and good.tpot_ms == 500
    assert not _result(1.0, 1.5, 2.5, tokens=2).ok


def test_finished_in_the_window_of_the_faster_configuration() -> None:
    def session(name: str, slow_s: float) -> Session:
        run = [
            PhaseRun(p, 0.0, slow_s, [_result(0, 1, 2), _result(0, 1, slow_s)], {"A": 0})
            for p in PHASES
        ]
        return Session(name, ("A", "B"), [run])

    fast, slow = session("elastic", 4.0), session("static", 9.0)
    windows_s = burst_windows(fast, slow)
    assert set(windows_s.values()) == {4.0}
    assert fast.phase("both")[0].finished_within(4.0) == 2
    assert slow.phase("both")[0].finished_within(4.0) == 1


def test_paced_changes_arrivals_and_nothing_else() -> None:
    shape = LoadShape()
    quick = shape.paced({"burst-a": 4.0, "burst-b": 3.0, "both": 2.0})
    before, after = make_load(shape, MODELS), make_load(quick, MODELS)
    for phase, span_s in zip(PHASES, (2.0, 1.5, 1.0), strict=True):
        assert max(r.at_s for r in after if r.phase == phase) == pytest.approx(span_s)
    assert [replace(r, at_s=0.0) for r in before] == [replace(r, at_s=0.0) for r in after]
