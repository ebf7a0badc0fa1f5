"""Who wants one model: requests that wait for it and requests that are with it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator

_LONG_S = 3600.0


class Demand:
    """Counts, and wakes whoever waits for something about the model to change. One event loop."""

    def __init__(self) -> None:
        self.waiting = 0
        """Requests that wait for it to start or wake."""
        self.in_use = 0
        """Requests that are with the engine."""
        self.uses = 0
        """Requests that ever were."""
        self._idle_since_s = time.monotonic()
        self._listeners: set[asyncio.Future[None]] = set()

    @property
    def quiet(self) -> bool:
        """Nobody wants it now."""
        return self.waiting == 0 and self.in_use == 0

    def idle_s(self) -> float:
        """Seconds since anybody wanted it; 0 while somebody does."""
        return time.monotonic() - self._idle_since_s if self.quiet else 0.0

    def still_s(self) -> float:
        """Seconds without a request at the engine and without one that was let through to it."""
        return 0.0 if self.in_use else time.monotonic() - self._idle_since_s

    def touch(self) -> None:
        """Counts the time of rest anew."""
        self._idle_since_s = time.monotonic()

    @contextlib.contextmanager
    def wait(self) -> Iterator[None]:
        """Around the wait of a request."""
        self.waiting += 1
        self.tell()
        try:
            yield
        finally:
            self.waiting -= 1
            self.touch()
            self.tell()

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Around the time that a request is with the engine."""
        self.in_use += 1
        self.uses += 1
        self.tell()
        try:
            yield
        finally:
            self.in_use -= 1
            self.touch()
            self.tell()

    def tell(self) -> None:
        """Something has changed: wakes everybody who waits for that."""
        for listener in self._listeners:
            _resolve(listener)

    async def next(self, limit_s: float = _LONG_S) -> None:
        """Waits for the next change, at most so long.

        Not by ``asyncio.wait_for``: before Python 3.12 it loses a cancellation that comes together
        with what is waited for.
        """
        loop = asyncio.get_running_loop()
        listener = loop.create_future()
        self._listeners.add(listener)
        timer = loop.call_later(max(0.0, limit_s), _resolve, listener)
        try:
            await listener
        finally:
            timer.cancel()
            self._listeners.discard(listener)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits until a condition holds; it is asked at each change."""
        while not condition():
            await self.next()


def _resolve(listener: asyncio.Future[None]) -> None:
    if not listener.done():
        listener.set_result(None)
