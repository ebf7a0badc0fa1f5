"""The whole service: one address, the router behind it, the engines behind that."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FrameType
from typing import Any, Protocol

import uvicorn

from kvcached.config import Config
from kvcached.errors import ConfigError
from kvcached.observe import Observer
from kvcached.router.app import Router
from kvcached.router.engine_command import service_environment
from kvcached.router.memory import Pressure
from kvcached.router.server import BACKLOG, make_server
from kvcached.router.settings import ListenSettings, ServeSettings
from kvcached.router.supervisor import Supervisor
from kvcached.router.upstream import Upstream
from kvcached.snapshot import LedgerSnapshot

logger = logging.getLogger(__name__)


class ElsewhereEngines(Protocol):
    """What the service needs of engines that run on other machines: as of a ``Supervisor``."""

    fault: asyncio.Event
    headers: Mapping[str, str]
    """What engines want to see in a request."""

    @property
    def models(self) -> Mapping[str, Upstream]:
        """The upstreams, by name."""

    async def start(self) -> None:
        """Starts what is to start at once."""

    async def stop(self) -> None:
        """Ends all engines."""

    def status(self) -> dict[str, Any]:
        """For `/status`."""

    def ledgers(self) -> Iterable[LedgerSnapshot]:
        """Of all machines, as last heard."""


async def run(
    settings: ServeSettings,
    inherited: Mapping[str, str],
    show: Callable[[str], None],
    announce: Callable[[str], None],
    elsewhere: Callable[[], ElsewhereEngines] | None = None,
) -> bool:
    """Serves until SIGTERM or SIGINT, then lets requests end (unless SIGINT comes again), and ends
    all engines. Returns False where a fault of ours ended it.

    ``show`` gets what engines print, ``announce`` the service's address once it can be used;
    ``elsewhere`` makes what runs engines on other machines in place of this one. Raises
    ConfigError where the address cannot be had, OSError where a log cannot be written. Call it in
    the process's main thread.
    """
    listener = _listen(settings.listen)
    with listener, contextlib.ExitStack() as stack:
        supervisor: Supervisor | ElsewhereEngines
        if elsewhere is None:
            supervisor = Supervisor(settings, inherited, show)
            config = Config.from_env(service_environment(settings, inherited))
            pressure = Pressure.of(stack.enter_context(Observer(config.directory)))
            headers: Mapping[str, str] = {}
        else:
            supervisor = elsewhere()
            pressure, headers = Pressure(supervisor.ledgers), supervisor.headers
        router = Router(
            settings,
            list(supervisor.models.values()),
            status=supervisor.status,
            pressure=pressure,
            engine_headers=headers,
        )
        host, port = listener.getsockname()[:2]
        server = make_server(router, host, port, settings.drain_s)
        with _told_to_end(server):
            try:
                await supervisor.start()
                fault = asyncio.create_task(_end_on_fault(server, supervisor))
                announce(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
                await server.serve([listener])
                fault.cancel()
                logger.info("no request is taken any more; the engines end")
            finally:
                await supervisor.stop()
    return not supervisor.fault.is_set()


@contextlib.contextmanager
def _told_to_end(server: uvicorn.Server) -> Iterator[None]:
    """Signals that come before the server listens for them itself, or again when it has ended."""

    def end(number: int, frame: FrameType | None) -> None:
        server.should_exit = True

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def _end_on_fault(server: uvicorn.Server, supervisor: Supervisor | ElsewhereEngines) -> None:
    """A keeper of a model that failed must not go on unseen."""
    await supervisor.fault.wait()
    server.should_exit = True


def _listen(listen: ListenSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    try:
        return socket.create_server((listen.host, listen.port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise ConfigError(f"listen: {listen.host}:{listen.port}: {reason}") from None
