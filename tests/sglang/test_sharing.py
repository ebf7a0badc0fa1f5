"""Two engines under one budget, of SGLang, or one of it and one of vLLM: memory goes to whoever
works, and comes back at a death.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
from sgl_harness import (
    MAX_TOKENS,
    MIB,
    PROMPTS,
    Engine,
    Sharing,
    VllmEngine,
    switched_on,
    wait_until,
)

pytestmark = pytest.mark.engine
CAPACITY = 6 * MIB  # of which a burst takes almost all


def sleeps_on_idle() -> dict[str, Any]:
    """SGLang's option for idle engines, where the version has it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        server_args = importlib.import_module("sglang.srt.server_args").ServerArgs
    names = getattr(server_args, "__annotations__", {}) | getattr(
        server_args, "__dataclass_fields__", {}
    )
    known = "sleep_on_idle" in names or hasattr(server_args, "sleep_on_idle")
    return {"sleep_on_idle": True} if known else {}


def two(model: Path, folder: Path, **kinds: type[Engine]) -> Sharing:
    """Engines of these kinds, by name, that wait for bursts."""

    def start(name: str) -> Engine:
        kind = kinds[name]
        arguments = {} if kind is VllmEngine else sleeps_on_idle()
        job = {"task": "bursts", "model": str(model), "arguments": arguments}
        changes = switched_on(folder, CAPACITY, name, KVCACHED_VIRTUAL=str(64 * MIB))
        number = sum(1 for _ in folder.glob(f"{name}-*"))
        return kind(folder / f"{name}-{number}", job, changes)

    return Sharing(folder, {name: functools.partial(start, name) for name in kinds})


def burst_in_turn_and_at_once(both: Sharing, reference: list[list[int]]) -> None:
    """What each says is right, whoever of them has cached the whole budget before."""
    assert len(reference) == len(PROMPTS) and len(reference[0]) == MAX_TOKENS
    first, second = both.engines
    for name in (first, second, first):  # each meets the other's cached prefixes
        assert both.burst(name) == reference
        assert both.charge(name) > CAPACITY // 2
    for name in both.engines:
        account = both.account(name)
        assert account is not None and account.reclaimed > 0
    for name in both.engines:
        both.start_burst(name)
    for name in both.engines:
        assert both.outputs(name) == reference


def test_bursts_in_turn_at_once_and_after_a_death(
    model: Path, reference: list[list[int]], tmp_path: Path
) -> None:
    with two(model, tmp_path, a=Engine, b=Engine) as both:
        burst_in_turn_and_at_once(both, reference)
        both.start_burst("a")
        both.wait_for_work("a")
        assert both.kill("a") < 1.5
        assert both.burst("b") == reference
        wait_until(lambda: both.charge("a") == 0, 10, "b clears the row of the dead")
    assert CAPACITY * 3 // 4 < both.memory.peak <= CAPACITY


@pytest.mark.parametrize("victim", ["sglang", pytest.param("vllm", marks=pytest.mark.matrix)])
def test_vllm_and_sglang_side_by_side(
    model: Path, reference: list[list[int]], tmp_path: Path, victim: str
) -> None:
    """What is right is what transformers says of the model, for both."""
    with two(model, tmp_path, sglang=Engine, vllm=VllmEngine) as both:
        burst_in_turn_and_at_once(both, reference)
        (other,) = both.engines.keys() - {victim}
        for name in (victim, other):
            both.start_burst(name)
        both.wait_for_work(victim)
        assert both.kill(victim) < 1.5
        assert both.outputs(other) == reference
        wait_until(lambda: both.charge(victim) == 0, 10, f"{other} clears the row of the dead")
        both.start_again(victim)
        assert both.burst(other) == reference
        assert both.burst(victim) == reference
        assert both.ledger.snapshot().high_water <= CAPACITY
    assert CAPACITY * 3 // 4 < both.memory.peak <= CAPACITY
