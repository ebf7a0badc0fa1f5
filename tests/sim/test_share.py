"""The simulator of sharing: nobody starves, guarantees are met, runs repeat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvcached.bench.share import InstanceSpec, jain, parse_instance, run
from kvcached.bench.share_load import read_trace
from kvcached.cli.main import app
from kvcached.config import Share
from kvcached.errors import ConfigError

MIB = 1 << 20


def played(*instances: str, seconds: float, seed: int = 1, **more: Any) -> dict[str, Any]:
    specs = [parse_instance(text) for text in instances]
    return run(specs, seconds=seconds, seed=seed, capacity_bytes=256 * MIB, **more)


def test_the_same_seed_is_the_same_run() -> None:
    loads = ("trace", "poisson", "bursts:guarantee=10%", "endless")
    first = played(*loads, seconds=60)
    assert played(*loads, seconds=60) == first
    assert played(*loads, seconds=60, seed=2) != first


@pytest.mark.parametrize(
    ("seconds", "seed"),
    [(500, 1), *(pytest.param(10_000, seed, marks=pytest.mark.slow) for seed in (2, 3, 4))],
)
def test_a_guarantee_is_met_beside_an_endless_demand(seconds: float, seed: int) -> None:
    result = played("endless", "bursts:guarantee=25%", seconds=seconds, seed=seed)
    endless, bursts = result["instances"]
    print(bursts)
    assert bursts["below_guarantee_s"] == 0
    assert bursts["finished"] > seconds / 20 and bursts["requests"] - bursts["finished"] < 16
    assert bursts["wait_p50_s"] <= 0.05, "half of them start in their first step"
    # The rest is not idle meanwhile, and what is guaranteed is not lent.
    assert 0.7 < endless["held"] <= 0.75
    without = played("endless", "bursts", seconds=seconds, seed=seed)["instances"][1]
    assert without["wait_p50_s"] > 10 * bursts["wait_p50_s"], "or the guarantee changes nothing"


@pytest.mark.parametrize(
    "seconds", [300, pytest.param(10_000, marks=pytest.mark.slow)], ids=lambda s: f"{s:g} s"
)
def test_an_endless_demand_starves_nobody(seconds: float) -> None:
    result = played("endless", "bursts", "poisson", seconds=seconds)
    _, bursts, poisson = result["instances"]
    assert bursts["finished"] > 0.8 * bursts["requests"] > seconds / 20
    # Poisson asks for more than a third of the device: it gets that third.
    assert poisson["part_of_share"] > 0.8
    assert result["utilisation"] > 0.95


def test_who_always_waits_has_its_weighted_share() -> None:
    result = played("endless", "endless:weight=3", "endless", seconds=400)
    assert [round(each["held"], 1) for each in result["instances"]] == [0.2, 0.6, 0.2]
    assert result["jain"] > 0.99
    assert result["utilisation"] > 0.97


def test_a_limit_is_kept_and_the_others_have_the_rest() -> None:
    limited, other = played("endless:limit=25%", "endless", seconds=100)["instances"]
    assert 0.2 < limited["held"] <= 0.25
    assert 0.7 < other["held"] <= 0.75


def test_preemption_brings_the_share_sooner() -> None:
    waiting = played("endless", "bursts", seconds=600)
    preempting = played("endless", "bursts", seconds=600, preempt=True)
    before, after = waiting["instances"][1], preempting["instances"][1]
    assert after["wait_p50_s"] < before["wait_p50_s"] / 2
    assert after["part_of_share"] > before["part_of_share"]
    assert preempting["instances"][0]["preempted"] > waiting["instances"][0]["preempted"]


def test_sixty_four_share_a_device() -> None:
    result = run(
        [parse_instance(load) for load in ("endless", "bursts", "poisson", "trace")] * 16,
        seconds=2,
        seed=1,
        capacity_bytes=512 * MIB,
    )
    assert len(result["instances"]) == 64
    assert result["high_water_bytes"] <= 512 * MIB


def test_a_specification_is_read_or_refused() -> None:
    spec = parse_instance("bursts:guarantee=25%:limit=1GiB:weight=2.5")
    assert spec == InstanceSpec("bursts", Share(percent=25), Share(1 << 30), 2.5)
    for wrong, word in {
        "always": "one of endless",
        "endless:colour=red": "'colour' is not",
        "endless:weight=heavy": "is not a number",
        "endless:guarantee=x%": "is not a number",
    }.items():
        with pytest.raises(ConfigError, match=word):
            parse_instance(wrong)
    with pytest.raises(ConfigError, match="65 instances"):
        run([spec] * 65, seconds=1, seed=1, capacity_bytes=1 << 30)
    with pytest.raises(ConfigError, match="no page of"):
        run([spec] * 2, seconds=1, seed=1, capacity_bytes=4 * MIB)


def test_traces_of_both_formats_are_read(tmp_path: Path) -> None:
    azure = tmp_path / "azure.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.9951690,396,109\n"
    )
    mooncake = tmp_path / "mooncake.jsonl"
    mooncake.write_text(
        '{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0]}\n'
        '{"timestamp": 3000, "input_length": 7322, "output_length": 490, "hash_ids": [1]}\n'
    )
    first, second = read_trace(azure)
    assert (first.prompt_tokens, second.output_tokens) == (374, 109)
    assert second.at_s - first.at_s == pytest.approx(4.314579)
    assert [row.at_s for row in read_trace(mooncake)] == [0.0, 3.0]
    assert len(read_trace(None)) == 600
    mooncake.write_text('{"timestamp": 0}\n')
    for wrong in (mooncake, tmp_path / "missing.csv"):
        with pytest.raises(ConfigError, match="not a trace"):
            read_trace(wrong)


def test_jain_says_how_equal() -> None:
    assert jain([0.5, 0.5, 0.5]) == pytest.approx(1)
    assert jain([1, 0, 0, 0]) == pytest.approx(0.25)
    assert jain([]) == jain([0.0]) == 1


def test_the_command_prints_a_table_or_json() -> None:
    runner = CliRunner()
    arguments = ["bench", "share", "--seconds", "20", "--instances", "3"]
    table = runner.invoke(app, arguments)
    assert table.exit_code == 0 and "endless-2" in table.output and "bursts-1" in table.output
    answer = runner.invoke(app, [*arguments, "--json"])
    assert len(json.loads(answer.stdout)["instances"]) == 3
