"""One model's line and the tickets of those who stand in it. No decisions here: see ``queues``."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import ExitStack
from itertools import islice

from kvcached.router.admission import WINDOW
from kvcached.router.errors import ApiError
from kvcached.router.estimate import Estimate
from kvcached.router.settings import QueueSettings, SloSettings
from kvcached.router.upstream import Upstream

_FADING = 0.9


class Line:
    """The requests of one model that wait, and how many are with its engine."""

    def __init__(self, upstream: Upstream, queue: QueueSettings, slo: SloSettings) -> None:
        self.upstream = upstream
        self.name = upstream.name
        self.queue = queue
        self.slo = slo
        self.estimate = Estimate()
        self.waiting: dict[int, Ticket] = {}  # oldest first
        self.running = 0
        self.admitted = 0
        self.before_first_token = 0
        self._mean_s = 1.0  # how long requests are with the engine

    def has_room(self) -> bool:
        """Whether one more may be with the engine."""
        return self.queue.max_running is None or self.running < self.queue.max_running

    def next_ones(self) -> Iterable[Ticket]:
        """The oldest that wait, as many as a policy looks at."""
        return islice(self.waiting.values(), WINDOW)

    def drains_s(self) -> float:
        """About how long until a place in the line is free, in seconds."""
        at_once = self.queue.max_running or max(1, self.running)
        return min(60.0, max(1.0, self._mean_s / at_once))

    def took(self, seconds: float) -> None:
        """A request was with the engine for so long."""
        self._mean_s = _FADING * self._mean_s + (1 - _FADING) * seconds


class Ticket:
    """One request's place: waiting, then through, then over."""

    __slots__ = (
        *("deadline_s", "device", "entered_s", "first_s", "future", "line", "number", "upstream"),
        *("shows_first", "through_s", "tokens", "_alone_at", "_ended", "_use"),
    )

    def __init__(
        self, line: Line, number: int, tokens: int, now_s: float, shows_first: bool
    ) -> None:
        self.shows_first = shows_first
        self.line = line
        self.upstream = line.upstream
        """The engine that it goes to: of several, the one chosen as it is let through."""
        self.number = number
        self.tokens = tokens
        self.entered_s = now_s
        due_ms = line.slo.ttft_ms + line.slo.ttft_ms_per_1k_prompt_tokens * tokens / 1000
        self.deadline_s = now_s + due_ms / 1000
        self.through_s: float | None = None
        self.first_s: float | None = None
        self.device: str | None = None
        self.future: asyncio.Future[None] | None = None
        self._use = ExitStack()
        self._alone_at: int | None = None
        self._ended = False

    @property
    def through(self) -> bool:
        """Whether it may go, or has gone, to its engine."""
        return self.through_s is not None

    def begin(self, now_s: float) -> None:
        """Lets it through. The engine is in use from now on: it cannot fall asleep before."""
        line = self.line
        self.through_s = now_s
        self.upstream = self._use.enter_context(line.upstream.use()) or line.upstream
        line.running += 1
        line.admitted += 1
        line.before_first_token += 1
        if line.before_first_token == 1:
            self._alone_at = line.admitted
        if self.future is not None and not self.future.done():
            self.future.set_result(None)

    def refuse(self, error: ApiError) -> None:
        """Ends its wait with an error."""
        if self.future is not None and not self.future.done():
            self.future.set_exception(error)

    def first_token(self, now_s: float) -> bool:
        """Notes the first token; whether it is the first. The model's estimate learns from it if
        no other prompt was computed meanwhile.
        """
        if self.first_s is not None or self.through_s is None:
            return False
        line = self.line
        self.first_s = now_s
        line.before_first_token -= 1
        if self.shows_first and self._alone_at == line.admitted:
            line.estimate.observe(self.tokens, now_s - self.through_s)
        return True

    def end(self, now_s: float) -> bool:
        """It is over; whether it had been let through."""
        if self._ended or self.through_s is None:
            return False
        self._ended = True
        self.line.running -= 1
        if self.first_s is None:
            self.line.before_first_token -= 1
        self.line.took(now_s - self.through_s)
        self._use.close()
        return True
