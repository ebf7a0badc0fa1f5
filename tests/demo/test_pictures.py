"""Every benchmark's picture is drawn from what the benchmark returns, or from a kept result."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from kvcached.bench import pictures
from kvcached.bench.reclaim import Figures

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "gpu"))


def kept(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    return result["result"]  # type: ignore[no-any-return]


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


@pytest.mark.parametrize(
    ("draw", "name"),
    [
        (pictures.elasticity, "elasticity-host"),
        (pictures.scale, "scale-host"),
        (pictures.fragmentation, "fragmentation"),
        (pictures.simulation, "simulate-18"),
        (pictures.multi_llm, "multi_llm-h100"),
    ],
)
def test_kept_results_are_drawn(tmp_path: Path, draw: Any, name: str) -> None:
    draw(kept(name), tmp_path / "picture.png")
    assert is_picture(tmp_path / "picture.png")


def test_times_to_a_lease_are_drawn(tmp_path: Path) -> None:
    figures = Figures([2.0, 3.0, 40.0], [200.0, 210.0, 220.0], [190.0, 200.0, 210.0])
    pictures.reclaim(
        {"idle": figures.summary(), "busy": figures.summary()}, tmp_path / "picture.png"
    )
    assert is_picture(tmp_path / "picture.png")


def test_memory_that_moved_is_drawn_from_its_samples(tmp_path: Path) -> None:
    import reclaim

    gib = 1 << 30
    samples = [
        reclaim.Sample(10.0, 20 * gib, 1 * gib, 0),
        reclaim.Sample(10.001, 20 * gib, 1 * gib, 18 * gib),
        reclaim.Sample(10.002, 20 * gib, 1 * gib, 18 * gib),
        reclaim.Sample(10.03, 2 * gib, 12 * gib, 7 * gib),
        reclaim.Sample(10.06, 2 * gib, 19 * gib, 0),
        reclaim.Sample(99.0, 3 * gib, 18 * gib, 0),
    ]
    wave = reclaim.movement(samples)
    assert wave["curve"] == [
        [-1.0, 20.0, 1.0, 0.0],
        [0.0, 20.0, 1.0, 18.0],
        [29.0, 2.0, 12.0, 7.0],
        [59.0, 2.0, 19.0, 0.0],
    ]
    pictures.moved(
        {"idle": wave, "busy": {"problem": "B was never short of memory"}}, tmp_path / "picture.png"
    )
    assert is_picture(tmp_path / "picture.png")


def test_overhead_is_drawn_by_pairs(tmp_path: Path) -> None:
    ratio = {"median": 0.997, "least": 0.99, "most": 1.001}
    kinds = {"plain": {"pairs_of_plain": ratio}, "kvcached": {"pairs_of_plain": ratio}}
    kinds["kvcached"]["long_of_plain"] = ratio
    summaries = [{"runner": "V2", "kinds": kinds}, {"runner": "V1", "problem": "none finished"}]
    pictures.overhead(summaries, ("pairs", "short", "long"), tmp_path / "picture.png")
    assert is_picture(tmp_path / "picture.png")


def test_pairs_are_drawn_by_what_their_work_is_about(tmp_path: Path) -> None:
    pair = {"plain": {"tpot_p99_ms": 7.0}, "kvcached": {"tpot_p99_ms": 7.1}}
    told = {"pairs": [pair], "of_plain": {"tpot_p99_ms": {"median": 7.1 / 7.0}}}
    pictures.pairs({"paced": told}, {"paced": "tpot_p99_ms"}, tmp_path / "picture.png")
    assert is_picture(tmp_path / "picture.png")
