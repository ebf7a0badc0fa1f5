"""Falling asleep and waking: in every state requests wait, and are answered."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import uvloop
from service import Service, ask, in_state, until

from kvcached.router.upstream import State

AFTER_S = 1.0


@pytest.fixture
def service(tmp_path: Path, toy_python: Path) -> Any:
    def make(*models: dict[str, Any], **more: Any) -> Service:
        return Service(tmp_path, toy_python, *models, **more)

    return make


def sleepy(how: str, **environment: str) -> dict[str, Any]:
    sleep = {"after_s": AFTER_S, "how": how, "kv_after_s": None}
    return {"name": "a", "sleep": sleep, "environment": environment}


@pytest.mark.parametrize(
    ("how", "slept"),
    [("kv", State.ASLEEP), ("engine-1", State.ASLEEP), ("stop", State.STOPPED)],
)
def test_requests_in_every_state_are_answered(service: Any, how: str, slept: State) -> None:
    made: Service = service(sleepy(how, TOY_SLEEP_S="0.3", TOY_START_S="0.3"))
    seen: set[State] = set()

    async def run() -> None:
        async with made.running() as supervisor:
            a = supervisor.models["a"]
            answers = []

            async def each_state() -> None:
                while True:
                    if a.state not in seen:
                        seen.add(a.state)
                        answers.append(asyncio.create_task(ask(a)))
                    await asyncio.sleep(0.001)

            watcher = asyncio.create_task(each_state())
            await in_state(a, slept)  # nobody has asked yet, or it fell asleep
            await until(lambda: slept in seen and State.FALLING_ASLEEP in seen, "all states")
            await until(lambda: all(answer.done() for answer in answers), "all answers")
            await in_state(a, slept)
            answers.append(asyncio.create_task(ask(a)))
            await asyncio.gather(*answers)
            watcher.cancel()

    uvloop.run(run())
    assert {State.STARTING, State.READY, State.FALLING_ASLEEP, slept} <= seen


def test_vllm_levels_are_what_is_called(service: Any) -> None:
    for how, expected in {
        "engine-1": ["POST /sleep?level=1", "POST /wake_up"],
        "engine-2": [
            "POST /sleep?level=2",
            "POST /wake_up?tags=weights",
            'POST /collective_rpc {"method":"reload_weights"}',
            "POST /wake_up?tags=kv_cache",
        ],
    }.items():
        model = {**sleepy(how), "name": how}
        made: Service = service(model)

        async def run(made: Service = made, how: str = how) -> None:
            async with made.running() as supervisor:
                model = supervisor.models[how]
                await ask(model)
                await in_state(model, State.ASLEEP)
                await ask(model)

        uvloop.run(run())
        calls = [line for line in made.record(how) if "/v1/" not in line]
        assert calls[1:] == expected
        assert '"--enable-sleep-mode"' in calls[0]


def test_a_long_request_is_not_idleness(service: Any) -> None:
    made: Service = service(sleepy("stop"))

    async def run() -> None:
        async with made.running() as supervisor:
            a = supervisor.models["a"]
            await ask(a, seconds=2 * AFTER_S)
            assert a.state is State.READY and made.starts("a") == 1

    uvloop.run(run())


def test_a_pinned_model_stays_awake(service: Any) -> None:
    model = sleepy("stop")
    model["sleep"]["keep_alive"] = True
    made: Service = service(model)

    async def run() -> None:
        async with made.running() as supervisor:
            await ask(supervisor.models["a"])
            await asyncio.sleep(2 * AFTER_S)
            assert supervisor.models["a"].state is State.READY

    uvloop.run(run())


def test_one_that_refuses_to_sleep_is_woken_at_once(service: Any) -> None:
    made: Service = service(sleepy("engine-1", TOY_REFUSES="/sleep"))

    async def run() -> None:
        async with made.running() as supervisor:
            a = supervisor.models["a"]
            first = (await ask(a))["pid"]
            await until(lambda: "POST /wake_up" in made.record("a"), "the wake")
            assert (await ask(a))["pid"] == first

    uvloop.run(run())


def test_one_that_does_not_wake_is_started_anew(service: Any) -> None:
    made: Service = service(sleepy("engine-1", TOY_REFUSES="/wake_up"))

    async def run() -> None:
        async with made.running() as supervisor:
            a = supervisor.models["a"]
            first = (await ask(a))["pid"]
            await in_state(a, State.ASLEEP)
            assert (await ask(a))["pid"] != first
            assert "did not wake: POST" in a.status().error

    uvloop.run(run())


def test_one_that_is_killed_asleep_is_started_for_the_next_request(service: Any) -> None:
    made: Service = service(sleepy("engine-1"))

    async def run() -> None:
        async with made.running() as supervisor:
            a = supervisor.models["a"]
            first = (await ask(a))["pid"]
            await in_state(a, State.ASLEEP)
            os.kill(first, signal.SIGKILL)
            await in_state(a, State.FAILED)
            assert (await ask(a))["pid"] != first

    uvloop.run(run())


def test_places_for_fewer_models_than_there_are(service: Any) -> None:
    models = [{**sleepy("stop"), "name": name} for name in ("a", "b", "c", "d")]
    made: Service = service(*models, max_awake=2, turn_s=1.0)

    async def run() -> None:
        async with made.running() as supervisor:
            most = 0

            async def count() -> None:
                nonlocal most
                while True:
                    running = [m for m in supervisor.models.values() if m.status().pid]
                    most = max(most, len(running))
                    await asyncio.sleep(0.001)

            counter = asyncio.create_task(count())
            wanted = [(name, n) for n in range(3) for name in "abcd"]
            tasks = [ask(supervisor.models[name], seconds=0.3) for name, _ in wanted]
            assert len(await asyncio.gather(*tasks)) == len(wanted)
            counter.cancel()
            assert most == 2

    uvloop.run(run())


def test_a_busy_model_leaves_its_place_after_its_turn(service: Any) -> None:
    models = [{**sleepy("stop"), "name": name} for name in ("a", "b")]
    made: Service = service(*models, max_awake=1, turn_s=1.0)

    async def run() -> None:
        async with made.running() as supervisor:
            a, b = supervisor.models["a"], supervisor.models["b"]
            end = asyncio.Event()

            async def keep_asking() -> int:
                answers = 0
                while not end.is_set():
                    await ask(a, seconds=0.2)
                    answers += 1
                return answers

            askers = [asyncio.create_task(keep_asking()) for _ in range(3)]
            await in_state(a, State.READY)
            await asyncio.wait_for(ask(b), 8)
            end.set()
            assert all(await asyncio.gather(*askers))

    uvloop.run(run())


def test_sglangs_sleep(service: Any, toy_sglang: Path) -> None:
    model = {**sleepy("engine-1", PYTHONPATH=str(toy_sglang)), "engine": "sglang"}
    made: Service = service({**model, "python": sys.executable})

    async def run() -> None:
        async with made.running() as supervisor:
            a = supervisor.models["a"]
            first = (await ask(a))["pid"]
            await in_state(a, State.ASLEEP)
            assert (await ask(a))["pid"] == first

    uvloop.run(run())
    calls = [line for line in made.record("a") if "/v1/" not in line]
    assert calls[1:] == [
        "POST /release_memory_occupation {}",
        "POST /resume_memory_occupation {}",
    ]
    assert '"--enable-memory-saver"' in calls[0]
