"""One node's agent: it owns the node's engines and reads its ledgers. It runs there, as an actor.

Its supervisor knows all models of the service; those that are not placed here are never asked for,
so they stay stopped. If the agent is killed, the supervisor's guard ends its engines.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx

from kvcached import devices
from kvcached.config import Config
from kvcached.hostmemory import available_memory
from kvcached.hosts.placement import Room
from kvcached.hosts.report import ModelReport, Report, Woken
from kvcached.observe import Observer
from kvcached.router.engine_command import Reach, service_environment
from kvcached.router.health import Progress, progress
from kvcached.router.settings import ServeSettings
from kvcached.router.supervised import Supervised
from kvcached.router.supervisor import Supervisor
from kvcached.router.upstream import State, UpstreamDown
from kvcached.snapshot import AccountSnapshot, LedgerSnapshot

logger = logging.getLogger(__name__)

_LOOK_S = 0.02
_REPORT_S = 0.25
_RATE_EVERY_S = 5.0
_RATE_LIMIT_S = 2.0
_FADING = 0.7
_AGAIN_S = 1.0
_KEPT_LINES = 10_000
_FENCED = 3  # the exit code of an agent that has lost its service


class Agent:
    """All methods run on the actor's event loop."""

    def __init__(
        self, settings: ServeSettings, node: str, address: str, key: str, lost_after_s: float
    ) -> None:
        """``address`` is the node's, where engines listen and ask for ``key``. Without a word from
        the service for ``lost_after_s`` the process ends, and all engines with it.
        """
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        _log_into(self._lines.append)
        on_demand = [m.model_copy(update={"start": "on demand"}) for m in settings.models]
        self._settings = settings.model_copy(update={"models": on_demand})
        self._node = node
        self._reach = Reach(address, key)
        self._lost_after_s = lost_after_s
        self._numbers = itertools.count(1)
        self._states: dict[str, State] = {}
        self._held: dict[str, contextlib.ExitStack] = {}
        self._hold_numbers: dict[str, int] = {}
        self._rates: dict[str, _Rate] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._heard_s = time.monotonic()

    async def begin(self) -> Room:
        """Starts the supervision; returns what the node has for models."""
        inherited = node_environment()
        config = Config.from_env(service_environment(self._settings, inherited))
        self._supervisor = Supervisor(self._settings, inherited, self._lines.append, self._reach)
        self._observer = Observer(config.directory)
        await self._supervisor.start()
        self._heard_s = time.monotonic()
        self._do(self._watch_the_service())
        self._do(self._follow_rates())
        return await asyncio.to_thread(room, config, self._settings.max_awake)

    async def report(self) -> Report:
        """The next report: at once where states differ from those of the last one, else soon."""
        self._heard_s = time.monotonic()
        end_s = self._heard_s + _REPORT_S
        while self._now() == self._states and time.monotonic() < end_s:
            await asyncio.sleep(_LOOK_S)
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        return replace(self._report(), lines=tuple(lines))

    async def wake(self, model: str) -> Woken:
        """Returns once the engine answers, or cannot."""
        try:
            await self._model(model).ready()
        except UpstreamDown as down:
            return Woken(self._report(), str(down), down.retry_after_s)
        return Woken(self._report())

    async def start(self, model: str) -> None:
        """Starts an engine, and again where that fails, until it is given up."""
        self._do(self._start(self._model(model)))

    async def hold(self, model: str, number: int, held: bool) -> None:
        """Whether requests of the service are with an engine. Older messages change nothing."""
        if number <= self._hold_numbers.get(model, 0):
            return
        self._hold_numbers[model] = number
        with contextlib.suppress(KeyError):
            self._held.pop(model).close()
        if held:
            stack = self._held[model] = contextlib.ExitStack()
            stack.enter_context(self._model(model).use())

    async def suspect(self, model: str, reason: str) -> None:
        """Looks at an engine now."""
        self._model(model).suspect(reason)

    async def stop(self) -> None:
        """Ends all engines, politely at first."""
        for task in self._tasks:
            task.cancel()
        await self._supervisor.stop()
        self._observer.close()

    def _model(self, name: str) -> Supervised:
        return self._supervisor.models[name]

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _now(self) -> dict[str, State]:
        return {name: model.state for name, model in self._supervisor.models.items()}

    def _report(self) -> Report:
        self._states = self._now()
        ledgers = tuple(self._observer.read())
        accounts = {account.name: account for ledger in ledgers for account in ledger.accounts}
        models = {
            name: self._model_report(model, accounts.get(name))
            for name, model in self._supervisor.models.items()
        }
        return Report(next(self._numbers), models, tuple(self._named(each) for each in ledgers))

    def _model_report(self, model: Supervised, account: AccountSnapshot | None) -> ModelReport:
        rate = self._rates.get(model.name)
        token_bytes = None
        if account is not None and account.block_bytes and account.block_tokens:
            token_bytes = account.block_bytes // account.block_tokens
        return ModelReport(
            state=model.state,
            url=model.url,
            status=asdict(model.status()),
            tokens_per_s=None if rate is None else rate.tokens_per_s,
            token_bytes=token_bytes,
        )

    def _named(self, ledger: LedgerSnapshot) -> LedgerSnapshot:
        """Devices of several hosts may have one name."""
        return replace(ledger, device=f"{self._node}/{ledger.device}")

    async def _start(self, model: Supervised) -> None:
        while model.status().failures < model.model.restart.give_up_after:
            try:
                await model.ready()
                return
            except UpstreamDown as down:
                await asyncio.sleep(max(_AGAIN_S, down.retry_after_s or 0.0))

    async def _watch_the_service(self) -> None:
        """Another host may serve our models by now: nothing of ours may go on."""
        while time.monotonic() - self._heard_s < self._lost_after_s:
            await asyncio.sleep(self._lost_after_s / 10)
        logger.critical("nothing was heard of the service for %g s", self._lost_after_s)
        os._exit(_FENCED)

    async def _follow_rates(self) -> None:
        async with httpx.AsyncClient(trust_env=False, headers=self._reach.headers) as client:
            while True:
                await asyncio.sleep(_RATE_EVERY_S)
                for name, model in self._supervisor.models.items():
                    if model.state is State.READY:
                        found = await progress(client, model.url, _RATE_LIMIT_S)
                        self._rates.setdefault(name, _Rate()).take(found)


class _Rate:
    """Tokens a second, smoothed."""

    def __init__(self) -> None:
        self.tokens_per_s: float | None = None
        self._last: tuple[float, float] | None = None

    def take(self, found: Progress | None) -> None:
        if found is None:
            return
        now_s = time.monotonic()
        if self._last is not None and found.tokens >= self._last[1]:
            rate = (found.tokens - self._last[1]) / (now_s - self._last[0])
            before = rate if self.tokens_per_s is None else self.tokens_per_s
            self.tokens_per_s = _FADING * before + (1 - _FADING) * rate
        self._last = (now_s, found.tokens)


def room(config: Config, awake: int | None) -> Room:
    """What this machine has for models, before any of ours runs."""
    device = devices.find(config)
    with devices.open_ledger(config, device) as ledger:
        found = ledger.snapshot()
    free = max(0, found.free)
    if not device.startswith("host:"):
        return Room(free, None, awake)
    # Pages of the pool come from the same memory as weights.
    return Room(free, max(0, available_memory() - free), awake)


def node_environment() -> Mapping[str, str]:
    """The environment in which the node was started: Ray gives its workers others, without GPUs
    and for one thread.
    """
    text = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    pairs = (pair.decode(errors="surrogateescape").partition("=") for pair in text.split(b"\0"))
    found = {name: value for name, _, value in pairs if name}
    found.pop("KVCACHED_INSTANCE", None)
    return found


def _log_into(show: Callable[[str], None]) -> None:
    """What we log goes the way of what engines print: to the service."""

    class ToTheService(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            show(f"{record.levelname} {record.name}: {self.format(record)}")

    ours = logging.getLogger("kvcached")
    ours.setLevel(logging.INFO)
    ours.addHandler(ToTheService())
