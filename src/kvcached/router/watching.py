"""Noticing that an engine which lives is of no use: it does not answer, is stopped, or stalls."""

from __future__ import annotations

import asyncio
import time

import httpx

from kvcached.router.engine_process import EngineProcess
from kvcached.router.health import Stall, progress, trouble
from kvcached.router.settings import HealthSettings

_AGAIN_S = 1.0
_SUSPECTED_LIMIT_S = 5.0  # who was seen to break a connection gets no long time to answer


class EngineFailed(Exception):
    """An engine has ended, hangs, or did not start. The text says which."""


class Watch:
    """Looks at one run of an engine. Raises EngineFailed when it must be ended."""

    def __init__(
        self, process: EngineProcess, url: str, client: httpx.AsyncClient, health: HealthSettings
    ) -> None:
        self.due_s = time.monotonic() + health.every_s
        """When the next look is due, on the monotonic clock."""
        self._process = process
        self._url = url
        self._client = client
        self._health = health
        self._failures = 0
        self._suspected = ""
        self._stall = Stall()

    def suspect(self, reason: str) -> None:
        """Looks at it now, and not for long."""
        self._suspected = reason
        self.due_s = time.monotonic()

    async def look(self, busy: bool) -> None:
        """Asks whether it answers, and where it is ``busy`` whether it gets anywhere."""
        limit_s = self._health.timeout_s
        if self._suspected:
            limit_s = min(limit_s, _SUSPECTED_LIMIT_S)
        reason = await self._stopped()
        if reason is None:
            reason = await trouble(self._client, self._url, limit_s)
        self._note(reason)
        stalled_after_s = self._health.stalled_after_s
        if reason is None and busy and stalled_after_s is not None:
            stood_s = self._stall.seconds(await progress(self._client, self._url, limit_s))
            if stood_s >= stalled_after_s:
                raise EngineFailed(f"runs requests and has made no token for {stood_s:.0f} s")

    async def look_at_processes(self) -> None:
        """Only whether it is stopped: an engine that starts or sleeps need not answer."""
        self._note(await self._stopped())

    async def _stopped(self) -> str | None:
        pids = await asyncio.to_thread(self._process.stopped)
        return f"process {pids[0]} was stopped by a signal" if pids else None

    def _note(self, reason: str | None) -> None:
        now_s = time.monotonic()
        if reason is None:
            self._failures, self._suspected = 0, ""
            self.due_s = now_s + self._health.every_s
            return
        self._failures += 1
        self.due_s = now_s + min(_AGAIN_S, self._health.every_s)
        if self._failures >= self._health.failures:
            before = f" ({self._suspected})" if self._suspected else ""
            raise EngineFailed(f"hangs: {reason}{before}")
