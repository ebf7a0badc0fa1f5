"""An engine that somebody else runs: for measurements of the router, and for its tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from kvcached.router.upstream import State


class FixedUpstream:
    """Taken as ready all the time; what it is suspected of is kept, and nothing follows."""

    def __init__(self, name: str, url: str) -> None:
        self.name = name
        self.url = url
        self.state = State.READY
        self.used = 0
        """Requests that are with it now."""
        self.suspicions: list[str] = []

    async def ready(self) -> None:
        """At once."""

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Counts."""
        self.used += 1
        try:
            yield
        finally:
            self.used -= 1

    def suspect(self, reason: str) -> None:
        """Keeps the reason, of the last hundred."""
        self.suspicions = [*self.suspicions[-99:], reason]
