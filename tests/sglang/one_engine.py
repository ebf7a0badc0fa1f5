"""One elastic SGLang engine against the plain answers, and what it may hold meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from memory_watch import MemoryWatch
from sgl_harness import PROMPTS, Engine, switched_on

from kvcached.units import ceil_div


def check(
    model: Path,
    plain: list[list[int]],
    tmp_path: Path,
    capacity: int,
    tight: bool,
    arguments: dict[str, Any],
    changes: dict[str, str],
    *paths: Path,
) -> None:
    job = {"task": "equality", "model": str(model), "arguments": arguments}
    on = switched_on(tmp_path, capacity, **changes)
    engine = Engine(tmp_path / "engine", job, on, *paths)
    with engine, MemoryWatch(lambda: [engine.session]) as memory:
        result = engine.answer()

    assert result["outputs"] == [plain, plain]
    loaded, reset = result["loaded"], result["reset"]
    assert memory.samples > 20
    assert (capacity - 2 * loaded["page"] if tight else 2 * loaded["page"]) < memory.peak
    assert memory.peak <= capacity
    assert loaded["high_water"] <= loaded["capacity"] == capacity
    assert loaded["block_tokens"] == arguments.get("page_size", 1)
    has_cache = "disable_radix_cache" not in arguments
    assert (loaded["cached"] > 0) == (loaded["evictions"] > 0 or not tight) == has_cache
    assert has_cache or loaded["hits"] == 0
    if not tight:
        assert (loaded["hits"], loaded["misses"]) == twice(loaded["block_tokens"])
        assert loaded["evictions"] == 0
    assert loaded["physical"] == loaded["created"] == loaded["charge"]
    assert reset["physical"] == reset["created"] == reset["charge"]
    assert reset["charge"] <= reset["pinned"] + reset["page"], "pinned and at most one warm page"


def twice(block: int) -> tuple[int, int]:
    """Blocks that the prefix cache answers, and that are computed, when all prompts come twice: no
    prompt begins as another does, and the last token is computed again, with all of its block.
    """
    lengths = [len(prompt) for prompt in PROMPTS]
    found = [(length - 1) // block for length in lengths]
    return sum(found), sum(ceil_div(length, block) for length in lengths) + len(PROMPTS)
