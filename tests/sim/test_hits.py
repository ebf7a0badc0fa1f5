"""The simulator of prefix caches: what is answered, what a cap loses, runs repeat."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvcached.bench import hits
from kvcached.bench.hits_engine import BLOCK_TOKENS, Prompt
from kvcached.cli.main import app
from kvcached.errors import ConfigError

CONVERSATIONS, TURNS = 24, 6


def rows() -> list[dict[str, object]]:
    """Conversations whose prompts grow by two blocks a turn, all under one first block."""
    made = []
    for turn in range(TURNS):
        for number in range(CONVERSATIONS):
            blocks = 3 + 2 * turn
            made.append(
                {
                    "timestamp": 1000 * (turn * CONVERSATIONS + number) * 4,
                    "input_length": blocks * BLOCK_TOKENS - 100,
                    "output_length": 200,
                    "hash_ids": [0, *(1000 * number + i for i in range(1, blocks))],
                }
            )
    return made


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows()) + "\n")
    return path


def test_without_a_cap_a_large_pool_answers_all_that_can_be_answered(trace: Path) -> None:
    result = hits.run(trace, [1_000_000, 60_000])
    large, small = result["pools"]
    assert large["reclaim"]["hit_rate"] == result["most_hits"] > 0.5
    assert large["capped"]["hit_rate"] < 0.5 * large["reclaim"]["hit_rate"]
    assert small["reclaim"]["hit_rate"] < large["reclaim"]["hit_rate"]
    assert all(
        pool[mode]["high_water_part"] <= 1 for pool in result["pools"] for mode in hits.MODES
    )
    assert small["reclaim"]["evictions"] > large["reclaim"]["evictions"] == 0


def test_the_same_seed_is_the_same_run(trace: Path) -> None:
    first = hits.run(trace, [60_000])
    assert hits.run(trace, [60_000]) == first
    assert hits.run(trace, [60_000], seed=2) != first
    assert hits.run(trace, [60_000], rows=50)["requests"] == 50


def test_conversations_stay_together_and_work_in_turns() -> None:
    prompts = [Prompt(float(at), 1024, 1, (0, at % 7, at)) for at in range(600)]
    parts = hits.split(prompts, seed=1)
    assert sum(map(len, parts)) == len(prompts) and all(parts)
    roots = [{prompt.hashes[1] for prompt in part} for part in parts]
    assert not roots[0] & roots[1]
    for who, part in enumerate(parts):
        assert [p.at_s for p in part] == sorted(p.at_s for p in part)
        half = hits.PERIOD_S / 2
        assert all((prompt.at_s % hits.PERIOD_S) // half == who for prompt in part)


def test_only_whole_blocks_are_cached_and_one_token_is_computed() -> None:
    assert Prompt(0, 2 * BLOCK_TOKENS, 1, (1, 2)).whole == 1
    assert Prompt(0, 2 * BLOCK_TOKENS + 1, 1, (1, 2, 3)).whole == 2
    assert Prompt(0, 2 * BLOCK_TOKENS + 1, BLOCK_TOKENS, (1, 2, 3)).blocks == 4


def test_what_is_no_trace_or_too_small_is_refused(trace: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected 28672 or more"):
        hits.run(trace, [20_000])
    trace.write_text('{"timestamp": 0, "input_length": 5, "output_length": 5}\n')
    for wrong in (trace, tmp_path / "missing.jsonl"):
        with pytest.raises(ConfigError, match="not a trace"):
            hits.read_prompts(wrong)


def test_the_command_prints_a_table_or_json_and_draws(trace: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    arguments = ["bench", "hits", "--trace", str(trace), "--pools", "0.06,0.2"]
    picture = tmp_path / "hits.png"
    done = runner.invoke(app, [*arguments, "--picture", str(picture)])
    assert done.exit_code == 0 and "0.06" in done.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    answer = runner.invoke(app, [*arguments, "--json"])
    assert len(json.loads(answer.stdout)["pools"]) == 2
    assert runner.invoke(app, [*arguments[:-1], "much"]).exit_code != 0
