"""One elastic engine says what plain SGLang and transformers say, and holds no more than stated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from one_engine import check
from sgl_harness import MIB, Engine, switched_on

pytestmark = pytest.mark.engine
FULL = pytest.mark.matrix  # one of many: run for each version by make matrix

TIGHT = 4 * MIB  # far less than all requests need at once
CASES = [
    # capacity, whether it must run out of memory, arguments
    pytest.param(64 * MIB, False, {}, id="roomy"),
    pytest.param(TIGHT, True, {}, id="tight", marks=FULL),
    pytest.param(TIGHT, True, {"disable_radix_cache": True}, id="tight-no-radix", marks=FULL),
    pytest.param(TIGHT, True, {"page_size": 16, "chunked_prefill_size": 128}, id="tight-paged"),
    pytest.param(
        TIGHT,
        True,
        {"page_size": 16, "disable_radix_cache": True},
        id="tight-paged-no-radix",
        marks=FULL,
    ),
    pytest.param(TIGHT, True, {"chunked_prefill_size": 64}, id="tight-chunked", marks=FULL),
    pytest.param(64 * MIB, False, {"page_size": 16}, id="roomy-paged", marks=FULL),
    pytest.param(
        TIGHT, True, {"disable_overlap_schedule": True}, id="tight-no-overlap", marks=FULL
    ),
]


@pytest.mark.parametrize(("capacity", "tight", "arguments"), CASES)
def test_outputs_are_those_of_plain_sglang(
    model: Path,
    plain: list[list[int]],
    tmp_path: Path,
    capacity: int,
    tight: bool,
    arguments: dict[str, Any],
) -> None:
    check(model, plain, tmp_path, capacity, tight, arguments, {"KVCACHED_VIRTUAL": str(64 * MIB)})


@pytest.mark.matrix
def test_layers_may_lie_apart(model: Path, plain: list[list[int]], tmp_path: Path) -> None:
    check(model, plain, tmp_path, 64 * MIB, False, {}, {"KVCACHED_LAYOUT": "layer"})


@pytest.mark.matrix
def test_the_prefix_cache_may_be_bounded(
    model: Path, plain: list[list[int]], tmp_path: Path
) -> None:
    changes = switched_on(tmp_path, 64 * MIB, KVCACHED_MAX_CACHED_TOKENS="128")
    job = {"task": "equality", "model": str(model), "arguments": {}}
    with Engine(tmp_path / "engine", job, changes) as engine:
        result = engine.answer()
    assert result["outputs"] == [plain, plain]
    assert result["loaded"]["evictions"] > 0
    assert result["loaded"]["cached"] <= 2 * result["loaded"]["page"]
