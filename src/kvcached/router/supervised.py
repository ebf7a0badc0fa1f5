"""One model's engine: started when wanted, watched, put to sleep and woken, restarted if it fails.

One task a model, the keeper, makes all changes one after the other; requests only say that they
wait, or that they are with the engine. Everything runs on the router's event loop.
"""

from __future__ import annotations

import asyncio
import logging
import shlex
import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import httpx

from kvcached.router.attending import Attending
from kvcached.router.demand import Demand
from kvcached.router.engine_command import HERE, EngineCommand, Reach
from kvcached.router.engine_process import EngineProcess
from kvcached.router.guard import Guard
from kvcached.router.health import serves, trouble
from kvcached.router.logs import EngineLog
from kvcached.router.seats import Seats
from kvcached.router.settings import ModelSettings
from kvcached.router.sleeping import sleeper
from kvcached.router.upstream import State, UpstreamDown
from kvcached.router.watching import EngineFailed, Watch

logger = logging.getLogger(__name__)

_START_LOOK_S = 0.2
_START_ANSWER_S = 5.0
_TAIL_LINES = 20


@dataclass(frozen=True, slots=True)
class Means:
    """What the supervision of all models shares."""

    guard: Guard
    client: httpx.AsyncClient
    starts: asyncio.Semaphore
    """Held while an engine starts."""
    seats: Seats
    command: Callable[[ModelSettings, int], EngineCommand]
    how: Callable[[ModelSettings], str]
    """How a model sleeps: see ``engine_command.how_it_sleeps``."""
    port: Callable[[], int]
    give_back: Callable[[ModelSettings, int], object]
    """Gives an idle model's KV cache back, by its session. It blocks: it is called in a thread."""
    reach: Reach = HERE


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """What `/status` says of one model. ``since_s`` is the time in this state."""

    name: str
    state: str
    since_s: float
    url: str
    pid: int | None
    starts: int
    failures: int
    """Starts and runs that failed one after the other."""
    requests: int
    """With the engine now."""
    waiting: int
    """For it to start or wake."""
    sleeps: str
    error: str
    """Why it failed the last time, with the last lines that it printed."""


class Supervised:
    """The ``Upstream`` of a model."""

    def __init__(self, model: ModelSettings, log: EngineLog, means: Means) -> None:
        self.model = model
        self.log = log
        self._means = means
        self._how = means.how(model)
        self._demand = Demand()
        its_sleep = sleeper(model.engine, self._how, means.client)
        self._attending = Attending(
            model.name, model.sleep, self._how, its_sleep, self._demand, self._give_back
        )
        self._port = means.port()
        self._state = State.STOPPED
        self._process: EngineProcess | None = None
        self._watch: Watch | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._due = model.start == "at once"
        self._ending = False
        self._state_since_s = self._ready_since_s = time.monotonic()
        self._starts = self._failures = self._failed_starts = 0
        self._not_before_s = 0.0
        self._start_failed = False
        self._why = self._error = ""

    # -- what the router sees: the Upstream -----------------------------------------------------

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def state(self) -> State:
        return self._state

    @property
    def url(self) -> str:
        return f"http://{self._means.reach.host}:{self._port}"

    async def ready(self) -> None:
        failed_before = self._failed_starts
        with self._demand.wait():
            while self._state is not State.READY or self._ending:
                if self._ending:
                    raise UpstreamDown("the service is shutting down")
                self._raise_if_failed(failed_before)
                await self._demand.next()

    def use(self) -> AbstractContextManager[None]:
        return self._demand.use()

    def suspect(self, reason: str) -> None:
        if self._watch is not None:
            self._watch.suspect(reason)
            self._demand.tell()

    def _raise_if_failed(self, failed_before: int) -> None:
        """A start that fails is told to those who waited for it, and until the next one is due to
        those who come. After the end of an engine that ran, requests wait for its restart.
        """
        left_s = self._not_before_s - time.monotonic()
        newcomer = self._failed_starts == failed_before
        if self._start_failed and not (newcomer and left_s <= 0):
            raise UpstreamDown(f"model {self.name} {self._why}", max(0.0, left_s))

    # -- what others see who want its seat ------------------------------------------------------

    def idle_s(self) -> float:
        return self._demand.idle_s()

    def awake_s(self) -> float:
        return time.monotonic() - self._state_since_s if self._state is State.READY else 0.0

    @property
    def movable(self) -> bool:
        can_leave = not self.model.sleep.keep_alive and self._how != "kv"
        return can_leave and self._state is State.READY and not self._attending.asked_to_sleep

    def ask_to_sleep(self) -> None:
        self._attending.asked_to_sleep = True
        self._demand.tell()

    # -- what the supervisor calls --------------------------------------------------------------

    def begin(self) -> asyncio.Task[None]:
        """Starts the keeper; it ends with ``end`` only, or with a fault of ours."""
        self._keeper = asyncio.create_task(self._keep(), name=f"keeper of {self.name}")
        return self._keeper

    async def end(self) -> None:
        """Ends the engine: politely, then by force. Requests that wait get UpstreamDown."""
        self._ending = True
        self._demand.tell()
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        if self._process is not None:
            self._become(State.STOPPING)
            await self._process.stop(self.model.stop_timeout_s)
        self._become(State.STOPPED)
        self.log.close()

    def status(self) -> ModelStatus:
        """What is known of it now."""
        return ModelStatus(
            name=self.name,
            state=self._state.value,
            since_s=round(time.monotonic() - self._state_since_s, 3),
            url=self.url,
            pid=None if self._process is None else self._process.pid,
            starts=self._starts,
            failures=self._failures,
            requests=self._demand.in_use,
            waiting=self._demand.waiting,
            sleeps=self._how,
            error=self._error,
        )

    # -- the keeper -----------------------------------------------------------------------------

    async def _keep(self) -> None:
        while True:
            await self._demand.until(lambda: self._due or not self._demand.quiet)
            try:
                watch = await self._start()
                await self._while_it_lives(
                    self._attending.run(watch, self.url, self._become, self._means.seats, self)
                )
            except EngineFailed as failure:
                await self._failed(str(failure))
                continue
            if self._process is not None:
                await self._process.stop(self.model.stop_timeout_s)
            self._forget_process()
            self._due = False
            self._become(State.STOPPED)

    async def _start(self) -> Watch:
        self._become(State.STARTING)
        await self._means.seats.take(self)
        async with self._means.starts:
            self._starts += 1
            command = self._means.command(self.model, self._port)
            self.log.begin()
            self.log.add("starts: " + shlex.join(command.arguments))
            process = await self._spawn(command)
            watch = Watch(process, self.url, self._means.client, self.model.health)
            await self._while_it_lives(self._answers(watch))
        self._start_failed = False
        self._ready_since_s = time.monotonic()
        self._watch = watch
        self._demand.touch()
        self._become(State.READY)
        return watch

    async def _spawn(self, command: EngineCommand) -> EngineProcess:
        """Also where we are cancelled meanwhile, what was started is known afterwards."""
        start = asyncio.ensure_future(EngineProcess.start(command, self._means.guard, self.log))
        try:
            await asyncio.shield(start)
        except OSError as error:
            reason = f"did not start: {command.arguments[0]}: {error.strerror}"
            raise EngineFailed(reason) from None
        finally:
            await asyncio.wait({start})
            if start.exception() is None:
                self._process = start.result()
        return start.result()

    async def _answers(self, watch: Watch) -> None:
        limit_s, client = self.model.start_timeout_s, self._means.client
        end_s = time.monotonic() + limit_s
        while (reason := await trouble(client, self.url, _START_ANSWER_S)) is not None:
            if time.monotonic() > end_s:
                raise EngineFailed(f"did not start within {limit_s:g} s: {reason}")
            if time.monotonic() >= watch.due_s:
                await watch.look_at_processes()
            await asyncio.sleep(_START_LOOK_S)
        if not await serves(client, self.url, self.name, _START_ANSWER_S):
            raise EngineFailed(f"did not start: what answers on {self.url} is not this model")

    async def _while_it_lives(self, work: Coroutine[Any, Any, None]) -> None:
        """Does the work; raises EngineFailed when the engine ends before it is done."""
        assert self._process is not None
        task = asyncio.create_task(work)
        end = asyncio.create_task(self._process.ended())
        try:
            await asyncio.wait({task, end}, return_when=asyncio.FIRST_COMPLETED)
            if end.done():
                raise EngineFailed(_how_it_ended(end.result()))
            task.result()
        finally:
            for each in (task, end):
                each.cancel()
            await asyncio.wait({task, end})

    async def _failed(self, reason: str) -> None:
        """Notes why, clears away what is left, and waits until the next start may be tried."""
        restart, now_s = self.model.restart, time.monotonic()
        ran = self._state is not State.STARTING
        if ran and now_s - self._ready_since_s > restart.forgotten_after_s:
            self._failures = 0
        self._failures += 1
        gives_up = self._failures >= restart.give_up_after
        wait_s = min(restart.longest_s, restart.first_s * 2 ** min(self._failures - 1, 30))
        if gives_up:
            wait_s = restart.longest_s
        self._not_before_s = now_s + wait_s
        self._due = not gives_up and (ran or self._due)
        self._start_failed = not ran or gives_up
        self._failed_starts += self._start_failed
        self._why = reason
        tail = self.log.tail(_TAIL_LINES)
        self._error = f"{reason}\n{tail}"
        what_next = "given up until it is asked for" if gives_up else f"restart in {wait_s:g} s"
        logger.error("%s %s; %s. Its output ends with:\n%s", self.name, reason, what_next, tail)
        self._become(State.FAILED)
        if self._process is not None:
            await self._process.kill()
        self._forget_process()
        await asyncio.sleep(self._not_before_s - time.monotonic())

    def _forget_process(self) -> None:
        self._process = self._watch = None
        self._attending.asked_to_sleep = False
        self._means.seats.leave(self)

    def _become(self, state: State) -> None:
        if state is not self._state:
            logger.info("%s is %s", self.name, state.value)
        self._state, self._state_since_s = state, time.monotonic()
        self._demand.tell()

    async def _give_back(self) -> None:
        if self._process is not None:
            await asyncio.to_thread(self._means.give_back, self.model, self._process.pid)


def _how_it_ended(code: int) -> str:
    return f"ended with {code}" if code >= 0 else f"was ended by signal {-code}"
