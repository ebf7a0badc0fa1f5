"""What the router sees of a model: an engine that may have to be started or woken first.

Everything here runs on the router's event loop; nothing is thread-safe.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from enum import Enum
from typing import Protocol


class State(str, Enum):  # StrEnum came with Python 3.11
    """Where a model's engine is, as pages, metrics and the router's admission name it."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    FALLING_ASLEEP = "falling asleep"
    ASLEEP = "asleep"
    WAKING = "waking"
    FAILED = "failed"  # waits before its next start, or has given up
    STOPPING = "stopping"

    def __str__(self) -> str:
        return self.value


class UpstreamDown(Exception):
    """A model cannot be used; the text says why and, where known, when to try again."""

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class Upstream(Protocol):
    """One model's engine."""

    @property
    def name(self) -> str:
        """The model's name, as requests and `/v1/models` give it."""

    @property
    def state(self) -> State:
        """Where the engine is now."""

    @property
    def url(self) -> str:
        """The engine's address (`http://127.0.0.1:PORT`), the same for its life, asleep too."""

    async def ready(self) -> None:
        """Return once the engine answers: start or wake it if need be.

        Many may wait at once. Cancelling one wait does not stop the start.

        Raises:
            UpstreamDown: it failed, or the service is shutting down.
        """

    def use(self) -> AbstractContextManager[Upstream | None]:
        """Hold the engine awake for as long as a request is with it: a long one is not idle.

        Where a model has several engines, gives the one that this request goes to.
        """

    def suspect(self, reason: str) -> None:
        """Tell that the engine refused or broke a connection: its health is looked at now."""
