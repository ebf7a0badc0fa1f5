"""The router with toy engines behind it: engines are processes, the router is a thread here."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from kvcached.ports import free_port
from kvcached.router.app import Router
from kvcached.router.engines import Limits
from kvcached.router.fixed import FixedUpstream
from kvcached.router.server import make_server
from kvcached.router.settings import ServeSettings

HERE = Path(__file__).parent
SHORT = Limits(connect_s=1.0, silence_s=1.0, stalled_client_s=1.0, body_s=1.0, first_retry_s=0.02)


def wait_until(condition: Callable[[], Any], limit_s: float, what: str) -> None:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < limit_s, f"not within {limit_s} s: {what}"
        time.sleep(0.01)


class ToyEngine:
    """One run of toy_engine.py after the other, at one address."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "toy_engine.py"), str(self.port)], stdin=subprocess.DEVNULL
        )
        wait_until(self._answers, 20, "the toy engine answers")

    def _answers(self) -> bool:
        assert self.process.poll() is None
        try:
            return httpx.get(self.url + "/seen").status_code == 200
        except httpx.HTTPError:
            return False

    def seen(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(self.url + "/seen").json()
        return found

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Running:
    """A router that serves in a thread of its own."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = make_server(router, "127.0.0.1", self.port, 2.0)
        self.loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        async def main() -> None:
            self.loop = asyncio.get_running_loop()
            await self.server.serve()

        asyncio.run(main())

    def call(self, function: Callable[[], Any]) -> Any:
        """Runs a function on the router's loop."""
        assert self.loop is not None

        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)

    def tasks(self) -> int:
        """How many tasks there are on the router's loop, this look at them apart."""
        return int(self.call(lambda: len(asyncio.all_tasks()) - 1))

    def __enter__(self) -> Running:
        self._thread.start()
        wait_until(lambda: self.server.started, 20, "the router listens")
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()


def serve_settings(**changes: Any) -> ServeSettings:
    """Models ``a`` (alias ``first``) and ``b``."""
    models = [{"name": "a", "aliases": ["first"]}, {"name": "b"}]
    return ServeSettings.model_validate({"models": models, **changes})


def running(engines: list[ToyEngine], limits: Limits = SHORT, **changes: Any) -> Running:
    """A router in front of both engines, with changed settings."""
    upstreams = [FixedUpstream(n, e.url) for n, e in zip("ab", engines, strict=True)]
    return Running(Router(serve_settings(**changes), upstreams, limits=limits))
