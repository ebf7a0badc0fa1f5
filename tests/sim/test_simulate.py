"""The simulation of fleets: GPUs as fast as measured, memory as the policy has it, fair sweeps."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvcached.bench import sim_check
from kvcached.bench.share_load import read_trace
from kvcached.bench.sim_engine import Engine, Request, play
from kvcached.bench.sim_fleet import Popularity, make_models, place
from kvcached.bench.sim_memory import Elastic, Static
from kvcached.bench.sim_shapes import SHAPES, Device
from kvcached.bench.sim_swap import PATIENCE_S, OneAwake, play_in_turns, wake_s
from kvcached.bench.simulate import HEADROOM, Fleet, Slo, even_parts, needed, run
from kvcached.cli.main import app
from kvcached.errors import ConfigError
from kvcached.units import GIB

DEVICE, LLAMA = Device(), SHAPES["8b"]
PAGE = LLAMA.page_bytes
TRACE = read_trace(None)


@pytest.mark.parametrize(
    ("requests", "context", "measured_ms"), [(48, 900, 8.1), (200, 1400, 20.9)]
)
def test_steps_take_what_they_took_on_a_gpu(
    requests: int, context: int, measured_ms: float
) -> None:
    took_ms = 1e3 * LLAMA.step_s(DEVICE, requests * context, 0, requests)
    assert took_ms == pytest.approx(measured_ms, rel=0.12)
    assert 8192 / LLAMA.step_s(DEVICE, 0, 8192) == pytest.approx(31_000, rel=0.05)


def test_a_lone_request_waits_for_its_prompt_and_then_for_each_step() -> None:
    request = Request(2.0, 1000, 101)
    play([Engine(LLAMA, DEVICE, Static([8 * GIB]), 0, [request])], 100.0)
    assert request.ttft_s == pytest.approx(LLAMA.step_s(DEVICE, 0, 1000, 1))
    between = request.tpot_s
    assert between is not None
    assert LLAMA.step_s(DEVICE, 1000, 0) <= between <= LLAMA.step_s(DEVICE, 1101, 0)


def test_two_engines_share_the_time() -> None:
    alone, beside, other = (Request(0.0, 100, 400) for _ in range(3))
    play([Engine(LLAMA, DEVICE, Static([8 * GIB]), 0, [alone])], 100.0)
    parts = Static([8 * GIB] * 2)
    play([Engine(LLAMA, DEVICE, parts, i, [r]) for i, r in enumerate((beside, other))], 100.0)
    assert alone.tpot_s is not None and beside.tpot_s is not None
    assert beside.tpot_s == pytest.approx(2 * alone.tpot_s, rel=0.05)


def test_short_memory_preempts_and_loses_no_token() -> None:
    requests = [Request(0.0, 500, 300) for _ in range(20)]
    part = 5000 * LLAMA.token_bytes
    engine = Engine(LLAMA, DEVICE, Static([part]), 0, requests)
    play([engine], 1000.0)
    assert all(request.end_s is not None for request in requests)
    assert sum(request.preempted for request in requests) > 0
    assert engine._held == engine._context == 0 and not engine.has_work
    roomy = [Request(0.0, 500, 300) for _ in range(20)]
    play([Engine(LLAMA, DEVICE, Static([64 * GIB]), 0, roomy)], 1000.0)
    assert max(r.end_s or 0 for r in roomy) < max(r.end_s or 0 for r in requests)


def test_what_never_fits_fails_and_delays_nobody() -> None:
    never, small = Request(0.0, 9000, 10), Request(0.1, 100, 10)
    play([Engine(LLAMA, DEVICE, Static([GIB]), 0, [never, small])], 10.0)
    assert never.failed and never.end_s is None and small.end_s is not None


def test_elastic_memory_is_never_more_than_there_is() -> None:
    memory = Elastic(10 * PAGE, [PAGE, PAGE])
    assert memory.ensure(0, 9 * PAGE) and not memory.ensure(0, 10 * PAGE)
    assert not memory.ensure(1, 5 * PAGE), "it is in use"
    memory.settle(0, 4 * PAGE, waits=False)
    assert not memory.ensure(0, 7 * PAGE), "the other waits for its share"
    assert memory.ensure(1, 5 * PAGE)
    assert memory.high_water == 10 * PAGE


def test_who_is_above_its_share_starts_nothing_while_another_waits() -> None:
    memory = Elastic(10 * PAGE, [PAGE, PAGE])
    assert memory.ensure(0, 9 * PAGE) and not memory.closed(0)
    assert not memory.ensure(1, 5 * PAGE)
    assert memory.closed(0) and not memory.closed(1)
    memory.settle(1, PAGE, waits=False)
    assert not memory.closed(0)


def test_even_parts_leave_nobody_without_its_least() -> None:
    assert even_parts(90, [10, 10, 10]) == [30, 30, 30]
    assert even_parts(90, [50, 10, 10]) == [50, 20, 20]


def test_a_side_needs_what_it_meets_the_slo_with_from_there_on() -> None:
    runs = [
        {"side": "even", "gpus": gpus, "slo": slo}
        for gpus, slo in ((3, 0.995), (4, 0.98), (5, 0.99), (6, 1.0))
    ]
    assert needed(runs, "even", 0.99) == 5
    assert needed(runs[:2], "even", 0.99) is None


def test_models_in_turns_wait_for_their_waking() -> None:
    first, second = Request(0.0, 500, 100), Request(0.0, 500, 100)
    memory = OneAwake([8 * GIB, 8 * GIB])
    engines = [Engine(LLAMA, DEVICE, memory, i, [r]) for i, r in enumerate((first, second))]
    play_in_turns(engines, [LLAMA, LLAMA], memory, 100.0)
    assert first.end_s is not None and second.first_s is not None
    assert wake_s(LLAMA) == pytest.approx(0.7, rel=0.01)
    prompt_s = LLAMA.step_s(DEVICE, 0, 500, 1)
    assert second.first_s == pytest.approx(first.end_s + wake_s(LLAMA) + prompt_s)


def test_a_busy_model_lets_others_have_their_turn() -> None:
    endless = [Request(0.05 * i, 500, 100) for i in range(400)]
    other = Request(1.0, 500, 10)
    memory = OneAwake([8 * GIB, 8 * GIB])
    engines = [Engine(LLAMA, DEVICE, memory, i, r) for i, r in enumerate((endless, [other]))]
    play_in_turns(engines, [LLAMA, LLAMA], memory, 200.0)
    assert other.ttft_s is not None and PATIENCE_S < other.ttft_s < PATIENCE_S + 4
    assert all(request.end_s is not None for request in endless)


def test_turns_are_long_enough_for_work_however_long_all_have_waited() -> None:
    loads = [[Request(0.1 * i, 1000, 200) for i in range(200)] for _ in range(3)]
    memory = OneAwake([8 * GIB] * 3)
    engines = [Engine(LLAMA, DEVICE, memory, i, load) for i, load in enumerate(loads)]
    play_in_turns(engines, [LLAMA] * 3, memory, 1000.0)
    assert all(request.end_s is not None and request.end_s < 100 for r in loads for request in r)


def fleet(count: int = 12, rate: float = 0.5) -> Fleet:
    models = make_models(
        count, ["8b", "1b"], Popularity(rate_per_model=rate), TRACE, seconds=60.0, seed=1
    )
    return Fleet(models, 60.0, Slo())


def test_models_are_asked_as_often_as_their_popularity_says() -> None:
    popularity = Popularity(rate_per_model=2.0)
    models = make_models(8, ["1b"], popularity, TRACE, seconds=3000.0, seed=1)
    wanted = popularity.rates(8)
    assert sum(wanted) == pytest.approx(16.0) and wanted[0] > 2 * wanted[7]
    for model, rate in zip(models, wanted, strict=True):
        assert model.rate == pytest.approx(rate, rel=0.1)
        times = [at_s for at_s, _, _ in model.requests]
        assert times == sorted(times) and times[-1] < 3000.0
        assert max(b - a for a, b in itertools.pairwise(times)) > 60, "it rests"


def test_places_have_room_for_weights_and_a_long_request() -> None:
    models = fleet().models
    assert place(models, 1, DEVICE, HEADROOM) is None
    places = place(models, 3, DEVICE, HEADROOM)
    assert places is not None and sorted(m.name for p in places for m in p) == sorted(
        m.name for m in models
    )
    for each in places:
        assert sum(model.shape.fixed_bytes for model in each) < DEVICE.memory_bytes
    busy = [sum(model.busy_part(DEVICE) for model in each) for each in places]
    heaviest = max(model.busy_part(DEVICE) for model in models)
    assert max(busy) < 0.5 * sum(busy) + heaviest and min(busy) > 0


def test_one_budget_serves_more_than_parts() -> None:
    played = fleet(rate=1.5)
    runs = {side: played.play(3, side) for side in ("elastic", "even", "load", "swap")}
    assert runs["elastic"] == played.play(3, "elastic"), "requests are fresh in each run"
    assert runs["elastic"]["requests"] == runs["even"]["requests"] > 500
    assert runs["elastic"]["slo"] > runs["even"]["slo"]
    assert runs["elastic"]["slo"] > runs["load"]["slo"]
    assert runs["elastic"]["slo"] > runs["swap"]["slo"]
    with pytest.raises(ValueError, match="do not fit"):
        played.play(1, "even")


def result(**changes: Any) -> dict[str, Any]:
    options = {"minutes": 1.0, "most_gpus": 6, "popularity": Popularity(), "slo": Slo()}
    return run(12, ["8b", "1b"], **(options | changes))


def test_a_sweep_ends_where_all_meet_the_slo() -> None:
    found = result()
    assert found == result() != result(seed=2)
    last = found["runs"][-3:]
    assert all(each["slo"] >= 0.99 for each in last) and last[0]["gpus"] < 6
    assert found["needed"]["elastic"] is not None
    assert found["needed"]["elastic"] <= found["needed"]["even"]


def test_what_requests_leave_is_cached_until_somebody_needs_it() -> None:
    memory = Elastic(10 * PAGE, [PAGE, PAGE], caching=True)
    assert memory.ensure(0, 9 * PAGE)
    memory.settle(0, 2 * PAGE, waits=False)
    assert memory.free == 0, "its cache holds the rest"
    assert memory.ensure(1, 8 * PAGE), "what answers nobody goes to who has requests"
    assert memory.free == 0
    memory.settle(1, 3 * PAGE, waits=False)
    assert memory.ensure(0, 7 * PAGE) and not memory.ensure(1, 4 * PAGE)
    memory.settle(1, 3 * PAGE, waits=True)
    memory.settle(0, 2 * PAGE, waits=False)
    assert memory.ensure(1, 4 * PAGE)


def test_the_own_cache_goes_before_what_others_wait_for() -> None:
    memory = Elastic(10 * PAGE, [PAGE, PAGE], caching=True)
    assert memory.ensure(0, 6 * PAGE)
    memory.settle(0, 2 * PAGE, waits=False)
    assert memory.free == 3 * PAGE and memory.ensure(0, 4 * PAGE)
    assert memory.free == PAGE, "nobody waits: idle memory first"
    memory.settle(0, 2 * PAGE, waits=False)
    assert not memory.ensure(1, 9 * PAGE), "two pages are in use"
    assert memory.ensure(0, 2 * PAGE) and memory.closed(1) is False


def test_engines_on_cores_of_their_own_do_not_share_the_time() -> None:
    two = Device(at_once=2)
    alone, beside, other = (Request(0.0, 100, 400) for _ in range(3))
    play([Engine(LLAMA, two, Static([8 * GIB]), 0, [alone])], 100.0, 2)
    parts = Static([8 * GIB] * 2)
    play([Engine(LLAMA, two, parts, i, [r]) for i, r in enumerate((beside, other))], 100.0, 2)
    assert alone.end_s is not None
    assert beside.end_s == pytest.approx(alone.end_s) == other.end_s


def test_who_comes_during_a_step_joins_the_one_after_the_next() -> None:
    step_s = LLAMA.step_s(DEVICE, 150, 0, 1)
    first, second = Request(0.0, 100, 400), Request(20.2 * step_s, 100, 4)
    play([Engine(LLAMA, DEVICE, Static([8 * GIB]), 0, [first, second])], 100.0)
    assert second.ttft_s is not None
    prompt_s = LLAMA.step_s(DEVICE, 200, 100, 2)
    assert step_s < second.ttft_s - prompt_s < 2.1 * step_s


def real(
    tmp_path: Path, device: Device = DEVICE, names: Sequence[str] = ("static", "elastic")
) -> Path:
    """A result of multi_llm.py, with the simulation's own figures as the real ones."""
    asks = [[[0.02 * i, 700, 150] for i in range(120)], [[5.0, 300, 50]]]
    plan = {"give_up_s": 60.0, "points": {"10/s": {"span_s": 12.0, "models": asks}}}
    sides = {}
    for side in names:
        ended = sim_check.simulate(["8b", "1b"], 4 * GIB, side, asks, 72.0, device)
        found = sim_check.figures_of(ended, Slo(1.0, 0.05))
        seen = {
            key: {one: found[f"{key[:4]}_{one}_s"] for one in ones}
            for key, ones in (("ttft_s", ("mean", "p50", "p99")), ("tpot_s", ("mean", "p50")))
        }
        point = {"all": {**seen, "slo": found["slo"]}, "preemptions": [1.0, 2.0]}
        sides[side] = {"points": {"10/s": point}}
    told = {
        "slo": {"ttft_s": 1.0, "tpot_s": 0.05},
        "shapes": ["8b", "1b"],
        "kv_bytes": 4 * GIB,
        "machine": "m",
        "date": "d",
        "plan": plan,
        "sides": sides,
    }
    path = tmp_path / "multi_llm.json"
    path.write_text(json.dumps(told))
    return path


def test_a_real_run_is_played_again(tmp_path: Path) -> None:
    rows = sim_check.check(real(tmp_path))["rows"]
    assert [row["side"] for row in rows] == ["static", "elastic"]
    for row in rows:
        assert row["simulated"]["ttft_mean_s"] == pytest.approx(row["real"]["ttft_mean_s"])
        assert row["simulated"]["ttft_p99_s"] == pytest.approx(row["real"]["ttft_p99_s"], abs=1e-4)
        assert row["agrees"]
    static, elastic = rows
    assert static["simulated"]["ttft_mean_s"] > elastic["simulated"]["ttft_mean_s"]
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a result"):
        sim_check.check(tmp_path / "other.json")


def test_models_that_have_the_machine_in_turn_are_played_again_too(tmp_path: Path) -> None:
    rows = sim_check.check(real(tmp_path, names=("elastic", "swap")))["rows"]
    assert [row["side"] for row in rows] == ["elastic", "swap"]
    assert all(row["agrees"] for row in rows)
    asks = [[[0.0, 700, 150]], [[0.1, 300, 50]]]
    first, second = sim_check.simulate(["8b", "1b"], 4 * GIB, "swap", asks, 60.0)
    assert first.end_s is not None and second.ttft_s is not None
    assert second.ttft_s + 0.1 > first.end_s + wake_s(SHAPES["1b"]), "after the first one's sleep"


def test_a_slower_machine_is_found_and_the_other_side_foretold(tmp_path: Path) -> None:
    slow = Device(bandwidth=1.5e12, compute=200e12, step_overhead_s=0.002)
    path = real(tmp_path, slow)
    asis, fitted = sim_check.check(path), sim_check.check(path, fit=True)
    assert not asis["agrees"] and fitted["agrees"]
    static, elastic = fitted["rows"]
    assert elastic["side"] == "elastic" and static["simulated"]["slo"] < 1
    for key in ("ttft_mean_s", "tpot_p50_s"):
        assert elastic["simulated"][key] == pytest.approx(elastic["real"][key], rel=0.2)
    (ratio,) = fitted["ratios"]
    assert ratio["simulated"] == pytest.approx(ratio["real"], rel=0.25)


def test_what_depends_on_contents_is_left_out(tmp_path: Path) -> None:
    path = real(tmp_path)
    told = json.loads(path.read_text())
    told["plan"]["points"]["10/s"]["prefixes"] = [[[1]], [[1]]]
    path.write_text(json.dumps(told))
    checked = sim_check.check(path)
    assert checked["left_out"] == ["10/s"] and checked["rows"] == []
    assert not checked["agrees"], "nothing was compared"


def test_the_command_prints_a_table_or_json_and_draws(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    arguments = ["bench", "simulate", "--models", "6", "--minutes", "0.5", "--most-gpus", "4"]
    asked = CliRunner().invoke(app, [*arguments, "--json", "--plot", str(picture)])
    assert asked.exit_code == 0, asked.output
    assert json.loads(asked.stdout)["models"] == 6
    assert picture.read_bytes().startswith(b"\x89PNG")
    checked = CliRunner().invoke(app, ["bench", "simulate", "--check", str(real(tmp_path))])
    assert checked.exit_code == 0 and "10/s" in checked.output
