"""All engines of a service: started, watched and ended together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import httpx

from kvcached.config import Config
from kvcached.ports import free_port
from kvcached.router import engine_command
from kvcached.router.giving_back import give_back
from kvcached.router.guard import Guard
from kvcached.router.logs import EngineLog
from kvcached.router.seats import Seats
from kvcached.router.settings import ModelSettings, ServeSettings
from kvcached.router.supervised import Means, Supervised

logger = logging.getLogger(__name__)


class Supervisor:
    """The engines of a service. Make it, and call everything, on the event loop."""

    def __init__(
        self,
        settings: ServeSettings,
        inherited: Mapping[str, str],
        show: Callable[[str], None],
        reach: engine_command.Reach = engine_command.HERE,
    ) -> None:
        """``inherited`` is the environment that engines get; ``show`` gets each line that they
        print; ``reach``: where they listen. Raises OSError where a log's file cannot be made.
        """
        self._settings = settings
        self._inherited = inherited
        self._guard = Guard()
        self._reach = reach
        self._client = httpx.AsyncClient(trust_env=False, headers=reach.headers)
        self._ports: set[int] = set()
        means = Means(
            guard=self._guard,
            client=self._client,
            starts=asyncio.Semaphore(settings.parallel_starts),
            seats=Seats(settings.max_awake, settings.turn_s),
            command=lambda model, port: engine_command.engine_command(
                settings, model, port, inherited, reach
            ),
            how=self._how,
            port=self._port,
            give_back=self._give_back,
            reach=reach,
        )
        self.models: Mapping[str, Supervised] = {
            model.name: Supervised(model, EngineLog(model.name, settings.logs, show), means)
            for model in settings.models
        }
        """The upstreams, by name."""
        self.fault = asyncio.Event()
        """Set where a fault of ours ended the supervision of a model."""

    async def start(self) -> None:
        """Starts what is to start at once, and returns without waiting for it."""
        await self._guard.start()
        for model in self.models.values():
            model.begin().add_done_callback(self._keeper_ended)

    async def stop(self) -> None:
        """Ends all engines, politely at first; returns when no process is left."""
        await asyncio.gather(*(model.end() for model in self.models.values()))
        await self._guard.end()
        await self._client.aclose()

    def status(self) -> dict[str, Any]:
        """For `/status`: plain values, ready for JSON."""
        models = [asdict(model.status()) for model in self.models.values()]
        return {"guard_pid": self._guard.pid, "models": models}

    def _environment(self, model: ModelSettings) -> dict[str, str]:
        return engine_command.engine_environment(self._settings, model, self._inherited)

    def _how(self, model: ModelSettings) -> str:
        gpu = engine_command.on_gpu(self._environment(model))
        return engine_command.how_it_sleeps(self._settings, model, gpu)

    def _port(self) -> int:
        """A free port that no other engine of ours was given."""
        while (port := free_port(self._reach.host)) in self._ports:
            pass
        self._ports.add(port)
        return port

    def _give_back(self, model: ModelSettings, session: int) -> int:
        config = Config.from_env(self._environment(model))
        return give_back(config.directory, session, model.name) if config.enabled else 0

    def _keeper_ended(self, keeper: asyncio.Task[None]) -> None:
        """A keeper that ends by itself is a fault of ours: it must not go unseen."""
        with contextlib.suppress(asyncio.CancelledError):
            if (error := keeper.exception()) is not None:
                logger.critical("%s has failed", keeper.get_name(), exc_info=error)
                self.fault.set()
