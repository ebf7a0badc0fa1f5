"""vLLM's sleep mode in the engine's core: in which order an engine falls asleep and wakes.

Asleep it holds the pinned page of its KV cache and what vLLM's own sleep mode leaves on the device.
Falling asleep: vLLM pauses its scheduler and drops its prefix cache; then every page goes back, and
only then the weights (``weights``), so that no step that carries commands comes after them. Waking:
room on all devices of the engine, then the weights; if either fails, it sleeps on and says so.

Everything runs on the engine's own thread and reaches the workers as vLLM's own calls do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from kvcached.engines.vllm.scheduler import Carry, ElasticScheduler
from kvcached.engines.vllm.start import NO_SLEEP_MODE
from kvcached.errors import EngineError, OutOfMemoryError


def attach(engine: Any, scheduler: ElasticScheduler, carry: Carry) -> None:
    """Takes the engine's sleep mode in hand; called once, when it is built."""
    executor = engine.model_executor
    engine.sleep = _checked(engine.sleep, executor.model_config)
    executor.sleep = _falling_asleep(executor, scheduler, carry)
    executor.wake_up = _waking(executor, scheduler)


def _checked(sleep: Callable[..., Any], model_config: Any) -> Callable[..., Any]:
    """Says no before vLLM has paused anything. Level 0 only pauses."""

    @functools.wraps(sleep)
    def checked(level: int = 1, *args: Any, **kwargs: Any) -> Any:
        if level > 0 and not model_config.enable_sleep_mode:
            raise EngineError(NO_SLEEP_MODE)
        return sleep(level, *args, **kwargs)

    return checked


def _falling_asleep(
    executor: Any, scheduler: ElasticScheduler, carry: Carry
) -> Callable[..., None]:
    vllms = executor.sleep

    @functools.wraps(vllms)
    def sleep(*args: Any, **kwargs: Any) -> None:
        if not executor.is_sleeping:
            commands = scheduler.fall_asleep()
            if commands is not None:
                carry(commands)
        try:
            vllms(*args, **kwargs)
        finally:
            scheduler.note_asleep(bool(executor.is_sleeping))

    return sleep


def _waking(executor: Any, scheduler: ElasticScheduler) -> Callable[..., None]:
    vllms = executor.wake_up

    @functools.wraps(vllms)
    def wake_up(tags: list[str] | None = None) -> None:
        if executor.is_sleeping and executor.sleeping_tags.issuperset(tags or ()):
            problems = [each for each in executor.collective_rpc("make_room", args=(tags,)) if each]
            if problems:
                executor.collective_rpc("leave_room")
                raise OutOfMemoryError(problems[0])
        try:
            vllms(tags)
        finally:
            scheduler.note_asleep(bool(executor.is_sleeping))

    return wake_up
