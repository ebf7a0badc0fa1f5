"""A supervisor over toy engines, for tests: its settings, its life, and looking at processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx

from kvcached.config import child_environment
from kvcached.router.settings import ServeSettings
from kvcached.router.supervised import Supervised
from kvcached.router.supervisor import Supervisor
from kvcached.router.upstream import State

QUICK_HEALTH = {"every_s": 0.2, "timeout_s": 1.0, "failures": 2}
QUICK_RESTART = {"first_s": 0.1, "longest_s": 0.5, "give_up_after": 3}


class Service:
    """A supervisor, with a record of what its engines were asked."""

    def __init__(self, folder: Path, python: Path, *models: dict[str, Any], **more: Any) -> None:
        self.folder = folder
        self.lines: list[str] = []
        for model in models:
            # Off: there is nothing elastic about a toy.
            environment = {"ENABLE_KVCACHED": "0", "TOY_RECORD": str(folder / model["name"])}
            model["environment"] = {**environment, **model.get("environment", {})}
            model.setdefault("python", str(python))
            model.setdefault("health", QUICK_HEALTH)
            model.setdefault("restart", QUICK_RESTART)
            model.setdefault("stop_timeout_s", 5)
        given = {"models": list(models), "memory": {"device": "host:toys"}, **more}
        self.settings = ServeSettings.model_validate(given)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Supervisor]:
        supervisor = Supervisor(self.settings, child_environment({}), self.lines.append)
        await supervisor.start()
        try:
            yield supervisor
        finally:
            await supervisor.stop()

    def record(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def starts(self, name: str) -> int:
        return sum(line.startswith("START") for line in self.record(name))


async def ask(model: Supervised, seconds: float = 0.0) -> dict[str, Any]:
    """A request as the router makes it."""
    await model.ready()
    with model.use():
        async with httpx.AsyncClient(trust_env=False) as client:
            url = model.url + "/v1/completions"
            answer = await client.post(url, json={"seconds": seconds}, timeout=30)
            answer.raise_for_status()
            found: dict[str, Any] = answer.json()
            return found


async def until(condition: Callable[[], Any], what: str, limit_s: float = 10.0) -> None:
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s, f"not within {limit_s} s: {what}"
        await asyncio.sleep(0.01)


async def in_state(model: Supervised, state: State, limit_s: float = 10.0) -> None:
    await until(lambda: model.state is state, f"{model.name} {state}", limit_s)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat", "rb") as stream:
        return stream.read().rpartition(b")")[2].split()[0] != b"Z"
