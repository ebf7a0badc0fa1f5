"""What the router sees of a model whose engines are on other hosts.

Everything here runs on the router's event loop. What is known of a replica are its agent's reports;
who is seen to refuse a connection counts as not ready until its agent has said so anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from kvcached.hosts.report import HostLost, Link, ModelReport, Report
from kvcached.router.demand import Demand
from kvcached.router.settings import ModelSettings
from kvcached.router.upstream import State, Upstream, UpstreamDown

_AGAIN_S = 2.0
_BEST_FIRST = (
    *(State.READY, State.WAKING, State.STARTING, State.FALLING_ASLEEP, State.ASLEEP),
    *(State.STOPPED, State.FAILED, State.STOPPING),
)
_ON_ITS_WAY = (State.READY, State.WAKING, State.STARTING, State.FALLING_ASLEEP)


class Replica:
    """One model on one host."""

    def __init__(
        self, model: str, host: str, link: Link, tell: Callable[[], None], lost: Callable[[], None]
    ) -> None:
        """``tell`` is called at each change, ``lost`` where the agent turns out to have ended."""
        self.host = host
        self.link = link
        self.in_use = 0
        """Requests that are with it."""
        self.downs = 0
        """Wakes that failed."""
        self.down = UpstreamDown("")
        """Why the last one of them did."""
        self.report: ModelReport | None = None
        self._model = model
        self._tell = tell
        self._lost = lost
        self._number = 0
        self._holds = 0
        self._suspected_s = 0.0
        self._trusted = True
        self._waking: asyncio.Task[None] | None = None

    @property
    def state(self) -> State:
        if self.report is None:
            return State.STOPPED
        if self.report.state is State.READY and not self._trusted:
            return State.STARTING
        return self.report.state

    @property
    def url(self) -> str:
        return "" if self.report is None else self.report.url

    def take(self, report: Report, asked_s: float) -> None:
        """A report that was asked for at a time of the monotonic clock."""
        if report.number <= self._number:
            return
        before = self.state
        self._number, self.report = report.number, report.models[self._model]
        self._trusted = self._trusted or asked_s >= self._suspected_s
        if self.state is not before:
            self._tell()

    def wake(self) -> None:
        """Has its agent make it ready, if that is not under way."""
        if self._waking is None:
            self._waking = asyncio.get_running_loop().create_task(self._wake())

    async def _wake(self) -> None:
        try:
            asked_s = time.monotonic()
            woken = await self.link.wake(self._model)
            self.take(woken.report, asked_s)
            if woken.down:
                self.downs += 1
                self.down = UpstreamDown(woken.down, woken.retry_after_s)
        except HostLost:
            self._lost()
        finally:
            self._waking = None
            self._tell()

    def enter(self) -> None:
        """One more request is with it."""
        self.in_use += 1
        if self.in_use == 1:
            self._hold(True)

    def leave(self) -> None:
        """One request less is."""
        self.in_use -= 1
        if self.in_use == 0:
            self._hold(False)

    def _hold(self, held: bool) -> None:
        self._holds += 1
        self.link.hold(self._model, self._holds, held)

    def suspect(self, reason: str) -> None:
        """Its engine refused or broke a connection."""
        self._suspected_s, self._trusted = time.monotonic(), False
        self.link.suspect(self._model, reason)

    def end(self) -> None:
        """It is no replica any more."""
        if self._waking is not None:
            self._waking.cancel()


class RemoteModel:
    """The ``Upstream`` of a model: all its replicas."""

    def __init__(self, model: ModelSettings) -> None:
        self.model = model
        self.replicas: tuple[Replica, ...] = ()
        self.missing = "the service starts"
        """Why there is none, or fewer than wanted."""
        self._demand = Demand()
        self._ending = False

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def state(self) -> State:
        states = [replica.state for replica in self.replicas]
        return min(states, key=_BEST_FIRST.index, default=State.FAILED)

    @property
    def url(self) -> str:
        """Of one replica; a request asks its own (``use``)."""
        return next((replica.url for replica in self.replicas), "")

    async def ready(self) -> None:
        seen: dict[Replica, int] = {}
        with self._demand.wait():
            while self.state is not State.READY or self._ending:
                if self._ending:
                    raise UpstreamDown("the service is shutting down")
                if not self.replicas:
                    raise UpstreamDown(f"no host serves it: {self.missing}", _AGAIN_S)
                failed = [r for r in self.replicas if seen.setdefault(r, r.downs) < r.downs]
                if len(failed) == len(self.replicas):
                    raise failed[0].down
                for replica in self.replicas:
                    if replica not in failed:
                        replica.wake()
                await self._demand.next()

    @contextlib.contextmanager
    def use(self) -> Iterator[Upstream]:
        with self._demand.use():
            ride = Ride(self)
            try:
                yield ride
            finally:
                ride.end()

    def suspect(self, reason: str) -> None:
        for replica in self.replicas:
            replica.suspect(reason)

    def least_busy(self) -> Replica | None:
        """Of the replicas that are ready, the one with the fewest requests."""
        ready = [replica for replica in self.replicas if replica.state is State.READY]
        return min(ready, key=lambda replica: replica.in_use, default=None)

    def change(self, replicas: Sequence[Replica], missing: str) -> None:
        """Other replicas; engines of new ones start where the model is wanted now."""
        gone = [replica for replica in self.replicas if replica not in replicas]
        new = [replica for replica in replicas if replica not in self.replicas]
        wanted = self.model.start == "at once" or not self._demand.quiet
        wanted = wanted or any(replica.state in _ON_ITS_WAY for replica in gone)
        for replica in gone:
            replica.end()
        self.replicas, self.missing = tuple(replicas), missing
        for replica in new:
            if wanted:
                replica.link.start(self.name)
        self.tell()

    def tell(self) -> None:
        """Something has changed."""
        self._demand.tell()

    def end(self) -> None:
        """Requests that wait get UpstreamDown."""
        self._ending = True
        self.tell()

    def status(self) -> list[dict[str, Any]]:
        """Of each replica, what its agent says."""
        found: list[dict[str, Any]] = []
        for replica in self.replicas:
            said: Mapping[str, Any] = {} if replica.report is None else replica.report.status
            counts = {"requests": replica.in_use, "waiting": self._demand.waiting}
            state = {"name": self.name, "host": replica.host, "state": replica.state.value}
            found.append({"pid": None, **said, **state, **counts})
        if len(found) < self.model.replicas:
            lacks: dict[str, Any] = {"name": self.name, "host": None, "state": "failed"}
            found.append(
                {**lacks, "pid": None, "error": self.missing, "waiting": self._demand.waiting}
            )
        return found


class Ride:
    """One request's way to a replica: an ``Upstream`` of its own."""

    def __init__(self, model: RemoteModel) -> None:
        self._model = model
        self._replica: Replica | None = None
        self._board()

    @property
    def name(self) -> str:
        return self._model.name

    @property
    def state(self) -> State:
        return self._model.state

    @property
    def url(self) -> str:
        return self._model.url if self._replica is None else self._replica.url

    async def ready(self) -> None:
        await self._model.ready()
        self._board()

    def use(self) -> AbstractContextManager[Upstream]:
        return self._model.use()

    def suspect(self, reason: str) -> None:
        if self._replica is not None:
            self._replica.suspect(reason)

    def end(self) -> None:
        """The request is over."""
        if self._replica is not None:
            self._replica.leave()
            self._replica = None

    def _board(self) -> None:
        best = self._model.least_busy()
        if best is not None:
            self.end()
            self._replica = best
            best.enter()
