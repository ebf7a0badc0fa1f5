"""The benchmarks of sizes, on real allocators, ledgers and host memory."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from kvcached.bench import elasticity, scale
from kvcached.bench.elasticity import ElasticityError
from kvcached.cache import ElasticCache
from kvcached.cli.main import app
from kvcached.units import KIB, MIB


def invoked(*arguments: str) -> str:
    asked = CliRunner().invoke(app, ["bench", *arguments])
    assert asked.exit_code == 0, asked.output
    return asked.stdout


def test_blocks_cost_the_same_in_any_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "BLOCKS", (1 << 13, 1 << 17))
    monkeypatch.setattr(scale, "PAGE_FACTORS", (1, 64))
    result = scale.run("host", 64 * KIB, 20)
    for key, times in scale.growth(result["blocks"]).items():
        assert times < 4, f"{key}: {result['blocks']}"
    pages = scale.growth(result["pages"])
    assert 4 < pages["page_in_us"] < 400, "the host's kernel charges for each byte"


def test_a_lease_costs_little_more_with_64_instances() -> None:
    few, many = (scale.ledger_costs(count, 50) for count in (1, 64))
    for key in ("lease_and_give_back_us", "publish_us", "pressed_us"):
        assert many[key] < 8 * few[key] + 0.5, f"{key}: {few} and {many}"
    assert many["snapshot_us"] > few["snapshot_us"]


def test_the_policy_grows_with_its_accounts() -> None:
    costs = scale.policy_costs(100, 30)
    assert 0 < costs["fair_shares_us"] < costs["target_us"] < 1e6


def test_growth_is_of_the_largest_over_the_smallest() -> None:
    assert scale.growth({8: {"a": 1.0, "b": 0.0}, 64: {"a": 3.0, "b": 1.0}}) == {"a": 3.0}


def test_a_cache_grows_and_gives_everything_back() -> None:
    told = elasticity.run("host", 256 * KIB, 24, 3)
    assert told["pages"] == 24 and told["rounds"] == 3
    assert told["rest_bytes"] == told["rest_pages"] * told["page_bytes"]
    assert 1 <= told["rest_pages"] <= 2, "page 0, and one that is warm"
    assert 0 < told["grow_ms"] <= told["grow_slowest_ms"]
    assert 0 < told["first_blocks_ms"] < told["grow_ms"]
    moved_gib = 24 * told["page_bytes"] / (1 << 30)
    assert told["shrink_gib_per_s"] == pytest.approx(1e3 * moved_gib / told["shrink_ms"], rel=0.05)


def test_memory_that_does_not_come_back_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elasticity, "LIMIT_S", 0.05)
    real = ElasticCache.free
    frees: list[int] = []

    def once(self: ElasticCache, ids: Any, cached: bool = False) -> None:
        frees.append(len(ids))
        real(self, ids, cached=len(frees) > 1)

    monkeypatch.setattr(ElasticCache, "free", once)
    with pytest.raises(ElasticityError, match="not given back"):
        elasticity.run("host", 256 * KIB, 8, 1)


def test_the_commands_print_tables_or_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "BLOCKS", (1 << 13,))
    monkeypatch.setattr(scale, "INSTANCES", (2,))
    monkeypatch.setattr(scale, "STANDINGS", (3,))
    told = json.loads(invoked("scale", "--rounds", "3", "--json"))
    assert told["growth"]["blocks"]["alloc1_warm_us"] == 1.0
    assert "bytes of a page" in invoked("scale", "--rounds", "3")
    small = ("elasticity", "--page-size", "256KiB", "--pages", "4", "--rounds", "1")
    assert json.loads(invoked(*small, "--json"))["page_bytes"] == MIB // 4
    assert "give all back" in invoked(*small)
