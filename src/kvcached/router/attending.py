"""One run of an engine while it lives: it is watched, gives back, falls asleep and wakes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from kvcached.router.demand import Demand
from kvcached.router.seats import Seats, Sitter
from kvcached.router.settings import SleepSettings
from kvcached.router.sleeping import Sleeper, SleepError
from kvcached.router.upstream import State
from kvcached.router.watching import EngineFailed, Watch

logger = logging.getLogger(__name__)

_PASSAGE_S = 0.5  # from the moment that a request is let through until it is with the engine


class Attending:
    """What the keeper does between an engine's start and its end. One event loop."""

    def __init__(
        self,
        name: str,
        sleep: SleepSettings,
        how: str,
        sleeper: Sleeper | None,
        demand: Demand,
        give_back: Callable[[], Awaitable[object]],
    ) -> None:
        self.asked_to_sleep = False
        """Others want its place."""
        self._name = name
        self._how = how
        self._sleeper = sleeper
        self._demand = demand
        self._give_back = give_back
        timed = not sleep.keep_alive
        self._kv_after_s = sleep.kv_after_s if timed else None
        self._after_s = sleep.after_s if timed else None
        self._given_at = -1  # the number of uses at which its KV cache went back

    async def run(
        self, watch: Watch, url: str, become: Callable[[State], None], seats: Seats, who: Sitter
    ) -> None:
        """Returns when it is to be stopped, FALLING_ASLEEP and without a request. Raises
        EngineFailed when it is of no use any more.
        """
        while True:
            await self._stay_awake(watch)
            become(State.FALLING_ASLEEP)  # from here on requests wait
            while (left_s := _PASSAGE_S - self._demand.still_s()) > 0:
                await self._look(watch, busy=self._demand.in_use > 0, limit_s=left_s)
            self.asked_to_sleep = False
            if self._how == "stop":
                return
            if self._sleeper is None:
                await self._rest(watch, become)
            else:
                await self._sleep(self._sleeper, watch, url, become, seats, who)
            self._demand.touch()
            become(State.READY)

    async def _stay_awake(self, watch: Watch) -> None:
        """Returns when it has been idle for as long as it takes, or its place is wanted."""
        while not self.asked_to_sleep:
            idle_s = self._demand.idle_s()
            if self._after_s is not None and idle_s >= self._after_s:
                return
            given = self._kv_after_s is None or self._given_at == self._demand.uses
            if not given and self._kv_after_s is not None and idle_s >= self._kv_after_s:
                self._given_at = self._demand.uses
                await self._give_back()
                continue
            waits = [] if given or self._kv_after_s is None else [self._kv_after_s - idle_s]
            waits += [] if self._after_s is None else [self._after_s - idle_s]
            limit_s = min(waits) if waits and self._demand.quiet else None
            await self._look(watch, busy=self._demand.in_use > 0, limit_s=limit_s)

    async def _rest(self, watch: Watch, become: Callable[[State], None]) -> None:
        """Sleep that keeps the weights: the engine could answer all the time."""
        giving = asyncio.ensure_future(self._give_back())
        giving.add_done_callback(lambda _: self._demand.tell())
        await self._demand.until(lambda: giving.done() or not self._demand.quiet)
        if self._demand.quiet:
            self._given_at = self._demand.uses
            become(State.ASLEEP)
            while self._demand.quiet:
                await self._look(watch, busy=False)

    async def _sleep(
        self,
        sleeper: Sleeper,
        watch: Watch,
        url: str,
        become: Callable[[State], None],
        seats: Seats,
        who: Sitter,
    ) -> None:
        try:
            await sleeper.fall_asleep(url)
        except SleepError as error:
            # Nobody knows how much of it sleeps: it is woken at once.
            logger.error("%s does not fall asleep: %s", self._name, error)
        else:
            become(State.ASLEEP)
            seats.leave(who)
            while self._demand.quiet:
                await self._look(watch, busy=False, asleep=True)
        become(State.WAKING)
        await seats.take(who)
        try:
            await sleeper.wake(url)
        except SleepError as error:
            raise EngineFailed(f"did not wake: {error}") from None

    async def _look(
        self, watch: Watch, busy: bool, limit_s: float | None = None, asleep: bool = False
    ) -> None:
        """Waits for a change, and looks at the engine when that is due."""
        left_s = watch.due_s - time.monotonic()
        if left_s <= 0 and asleep:
            await watch.look_at_processes()
        elif left_s <= 0:
            await watch.look(busy)
        else:
            await self._demand.next(left_s if limit_s is None else min(left_s, limit_s))
