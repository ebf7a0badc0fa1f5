"""Where requests wait for their model: one bounded line for each, and who goes next.

A request leaves its line when its engine is ready, fewer than ``max_running`` of the model's are
with the engine, and, where a device's memory is short, when the policy says that its turn has come.
Without a shortage a line is first in, first out, and lines know nothing of each other.

Where memory is short, the lines of all models on the device are one: requests are let through one
at a time, the next one when the first token of the last is there, or should have been long ago. So
an engine that hangs costs the others a moment and not their turn.

Everything runs on the event loop; nothing is thread-safe.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from kvcached.router import admission
from kvcached.router.admission import Job, Policy
from kvcached.router.errors import ApiError, unavailable
from kvcached.router.line import Line, Ticket
from kvcached.router.upstream import State, UpstreamDown

BATCH_TOKENS = 2048
"""So many tokens of prompts are computed at once: what an engine does in a step by default. Longer
prompts are let through alone,"""
LEAST_TOKENS = 64
"""and each counts as so many at least."""
PATIENCE = 3.0
"""A first token holds up the others for at most so many times as long as was expected,"""
MIN_HOLD_S, MAX_HOLD_S = 0.25, 10.0
"""within these bounds."""
_NOT_READY_YET_S = 0.05

NOTHING_SHORT: Mapping[str, str] = MappingProxyType({})


class Gate:
    """All lines."""

    def __init__(
        self,
        lines: Iterable[Line],
        policy: Policy = admission.deadlines,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.lines = {line.name: line for line in lines}
        self.short: Mapping[str, str] = NOTHING_SHORT
        self._policy = policy
        self._clock = clock or (lambda: asyncio.get_running_loop().time())
        self._arrivals = 0
        self._turns: dict[str, int] = {}  # admissions by device, while it was short
        self._holds: dict[str, dict[Ticket, asyncio.TimerHandle]] = {}  # by device
        self._wakers: dict[str, asyncio.Task[None]] = {}

    def enter(self, line: Line, tokens: int, shows_first: bool = True) -> Ticket:
        """Takes a place in a model's line; the ticket may be let through already.

        ``shows_first``: the first byte of the answer tells that the prompt is computed.
        Raises ApiError 429 where too many wait. The caller must ``leave`` in the end.
        """
        now_s = self._clock()
        self._arrivals += 1
        ticket = Ticket(line, self._arrivals, tokens, now_s, shows_first)
        line.waiting[ticket.number] = ticket
        self._pump(line)
        if len(line.waiting) > line.queue.max_waiting and not ticket.through:
            del line.waiting[ticket.number]
            text = f"{line.queue.max_waiting} requests wait for the model {line.name!r} already."
            raise ApiError(
                *(429, text, "queue_full"), kind="rate_limit_error", retry_after_s=line.drains_s()
            )
        if not ticket.through:
            ticket.future = asyncio.get_running_loop().create_future()
        return ticket

    async def turn(self, ticket: Ticket) -> None:
        """Waits until the ticket is let through.

        Raises ApiError 503 where the model cannot be used, 504 after the line's ``timeout_s``.
        """
        if ticket.future is None:
            return
        loop = asyncio.get_running_loop()
        timer = loop.call_later(ticket.line.queue.timeout_s, self._too_late, ticket)
        try:
            await ticket.future
        finally:
            timer.cancel()

    def _too_late(self, ticket: Ticket) -> None:
        line = ticket.line
        text = f"The request waited {line.queue.timeout_s:g} s for the model {line.name!r}"
        text += (
            "."
            if line.upstream.state is State.READY
            else f", which is {line.upstream.state.value}."
        )
        ticket.refuse(ApiError(504, text, "queue_timeout", kind="timeout_error"))

    def first_token(self, ticket: Ticket) -> None:
        """The first byte of the answer is there: of a stream, the first token."""
        if ticket.first_token(self._clock()):
            self._release(ticket)

    def leave(self, ticket: Ticket) -> None:
        """The request is over, or its client is gone; may be called at any time, and again."""
        line = ticket.line
        line.waiting.pop(ticket.number, None)
        if ticket.end(self._clock()):
            self._release(ticket)
            self._pump(line)

    def follow(self, short: Mapping[str, str]) -> None:
        """Takes over which devices are short (``Pressure.short``)."""
        self.short = short
        for line in self.lines.values():
            self._pump(line)

    def close(self) -> None:
        """Ends what runs on its own; requests that wait are refused."""
        for waker in self._wakers.values():
            waker.cancel()
        for timers in self._holds.values():
            for timer in timers.values():
                timer.cancel()
        self._holds.clear()
        for line in self.lines.values():
            self._refuse(line, UpstreamDown("the service ends"))

    # -- Who is next ----------------------------------------------------------------------------

    def _pump(self, line: Line) -> None:
        """Lets through whoever may go now."""
        device = self.short.get(line.name)
        if device is not None:
            self._pump_device(device)
            return
        while self._open(line):
            self._let_through(next(iter(line.waiting.values())))

    def _open(self, line: Line) -> bool:
        """Whether the line's next request may go to its engine. Wakes the engine for it."""
        if not line.waiting or not line.has_room():
            return False
        if line.upstream.state is State.READY:
            return True
        if line.name not in self._wakers:
            waker = asyncio.get_running_loop().create_task(self._wake(line))
            self._wakers[line.name] = waker
        return False

    def _pump_device(self, device: str) -> None:
        while True:
            lines = [line for line in self.lines.values() if self.short.get(line.name) == device]
            tickets = {t.number: t for line in lines if self._open(line) for t in line.next_ones()}
            if not tickets:
                return
            turn = self._turns.get(device, 0)
            jobs = [_job(ticket) for ticket in tickets.values()]
            chosen = tickets[self._policy(jobs, self._clock(), turn).number]
            holding = self._holds.get(device)
            if holding and sum(map(_batch, holding)) + _batch(chosen) > BATCH_TOKENS:
                return
            self._turns[device] = turn + 1
            self._hold(device, chosen)
            self._let_through(chosen)

    def _hold(self, device: str, ticket: Ticket) -> None:
        """Takes its part of what is computed at once on this device until its first token."""
        most_s = ticket.line.estimate.seconds(ticket.tokens)
        if ticket.shows_first:
            most_s = max(MIN_HOLD_S, PATIENCE * most_s)
        most_s = min(MAX_HOLD_S, most_s)
        timer = asyncio.get_running_loop().call_later(most_s, self._release, ticket)
        ticket.device = device
        self._holds.setdefault(device, {})[ticket] = timer

    def _release(self, ticket: Ticket) -> None:
        device = ticket.device
        if device is None:
            return
        timer = self._holds[device].pop(ticket, None)
        if timer is not None:
            timer.cancel()
            self._pump_device(device)

    def _let_through(self, ticket: Ticket) -> None:
        del ticket.line.waiting[ticket.number]
        ticket.begin(self._clock())

    # -- Engines that are not ready -------------------------------------------------------------

    async def _wake(self, line: Line) -> None:
        try:
            await line.upstream.ready()
            while line.upstream.state is not State.READY and line.waiting:
                await asyncio.sleep(_NOT_READY_YET_S)  # fell asleep again in this very moment
                await line.upstream.ready()
        except UpstreamDown as down:
            self._refuse(line, down)
        finally:
            self._wakers.pop(line.name, None)
        self._pump(line)

    def _refuse(self, line: Line, down: UpstreamDown) -> None:
        for ticket in tuple(line.waiting.values()):
            ticket.refuse(unavailable(line.name, down))
        line.waiting.clear()


def _batch(ticket: Ticket) -> int:
    return max(LEAST_TOKENS, ticket.tokens)


def _job(ticket: Ticket) -> Job:
    return Job(ticket.number, ticket.line.estimate.seconds(ticket.tokens), ticket.deadline_s)
