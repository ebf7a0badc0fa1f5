"""The simulation of fragmentation: what it counts adds up, and what the allocator achieves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvcached.bench import churn, fragmentation
from kvcached.bench.churn import Churn, Load
from kvcached.bench.compaction import Compactor
from kvcached.bench.share_load import read_trace
from kvcached.cli.main import app
from kvcached.ledger import Ledger
from kvcached.units import GIB

ROWS = read_trace(None)


def engine(folder: Path, load: Load, *, per_page: int = 16, cached: bool = False) -> Churn:
    ledger = Ledger.open(folder / "ledger", "host:test", 40 * GIB)
    return Churn(ledger, load, ROWS, per_page, cached=cached)


def test_as_many_requests_run_as_were_asked_for(tmp_path: Path) -> None:
    played = engine(tmp_path, Load(9, steady=True))
    for _ in range(500):
        played.step()
    assert played.at_once == 9 and played.finished > 50 and played.refused == 0


def test_arrivals_keep_the_number_on_average_and_sleep_at_night() -> None:
    arrivals = Load(20, seed=3).arrivals(ROWS)
    rows = [next(arrivals) for _ in range(60_000)]
    lifetime_s = sum(row.output_tokens for row in ROWS) / len(ROWS) / churn.TOKENS_PER_S
    hours = rows[-1].at_s / 3600
    assert 4 < hours < 12
    first = sum(row.at_s < 3600 for row in rows) * lifetime_s / 3600
    last = sum(row.at_s > rows[-1].at_s - 3600 for row in rows) * lifetime_s / 3600
    assert 0.45 * 20 < first < 0.6 * 20 < last < 1.6 * 20


@pytest.mark.parametrize("mode", list(fragmentation.MODES))
def test_what_is_mapped_is_held_or_holes_or_warm(mode: str) -> None:
    run = fragmentation.play(ROWS, 8, 16, mode, hours=0.05, seed=1)
    parts = 1 + run["holes_part"] + run["warm_part"]
    assert run["ratio"]["of_sums"] == pytest.approx(parts, abs=2e-4) and parts > 1
    assert run["refused"] == 0 and run["finished"] > 100


def test_the_same_seed_is_the_same_run() -> None:
    first = fragmentation.play(ROWS, 8, 32, "day", hours=0.03, seed=1)
    assert fragmentation.play(ROWS, 8, 32, "day", hours=0.03, seed=1) == first
    assert fragmentation.play(ROWS, 8, 32, "day", hours=0.03, seed=2) != first


def test_blocks_that_are_cached_are_no_holes() -> None:
    run = fragmentation.play(ROWS, 32, 32, "cached", hours=0.1, seed=1)
    assert run["ratio"]["of_sums"] < 1.02


def test_with_32_requests_a_tenth_is_lost_at_most() -> None:
    run = fragmentation.play(ROWS, 32, 32, "steady", hours=0.5, seed=1)
    assert 1.02 < run["ratio"]["of_sums"] <= 1.10


def test_compaction_keeps_every_request_whole(tmp_path: Path) -> None:
    played = engine(tmp_path, Load(8, seed=5))
    compactor = Compactor(played)
    for step in range(1, 4000):
        played.step()
        if step % 50 == 0:
            before = [len(r.blocks) for group in played.running for r in group]
            busy = played.pool.blocks.present_pages - played.pool.blocks.empty_pages
            compactor.work()
            played.pool.check()
            blocks = [b for group in played.running for r in group for b in r.blocks]
            assert [len(r.blocks) for group in played.running for r in group] == before
            assert len(set(blocks)) == len(blocks) == played.pool.blocks.used_blocks - 1
            after = played.pool.blocks.present_pages - played.pool.blocks.empty_pages
            assert after <= busy
    assert compactor.moved > 100


def test_the_command_prints_json_and_draws(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    arguments = ["--requests", "4", "--pages", "16,32", "--modes", "steady", "--hours", "0.02"]
    asked = CliRunner().invoke(
        app, ["bench", "fragmentation", *arguments, "--json", "--plot", str(picture)]
    )
    assert asked.exit_code == 0, asked.output
    told = json.loads(asked.stdout)
    assert [run["page_mib"] for run in told["runs"]] == [16, 32]
    assert picture.read_bytes().startswith(b"\x89PNG")
    wrong = CliRunner().invoke(app, ["bench", "fragmentation", "--modes", "no"])
    assert wrong.exit_code != 0
