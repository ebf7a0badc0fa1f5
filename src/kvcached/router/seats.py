"""How many engines hold their weights at once, where the device has no room for all of them.

Who wants to wake where all seats are taken asks the model that has been idle longest to fall
asleep, before its time. If none is idle, it waits for a while; then the one that has sat longest
takes no further requests, finishes those that it has, and sleeps. Requests for it wait meanwhile.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

_LOOK_S = 0.1
_IDLE_S = 0.5


class Sitter(Protocol):
    """A model as those see it who want its place."""

    def idle_s(self) -> float:
        """Seconds without a request; 0 while it has one."""

    def awake_s(self) -> float:
        """Seconds since it woke: its start is no part of its turn."""

    @property
    def movable(self) -> bool:
        """Whether it is awake, may be put to sleep, and has not been asked to."""

    def ask_to_sleep(self) -> None:
        """It gives its seat up as soon as the requests that it has are answered."""


class Seats:
    """Places for engines that are awake. One event loop."""

    def __init__(self, number: int | None, turn_s: float) -> None:
        """``turn_s``: how long a busy model sits before others may have its place."""
        self._number = number
        self._turn_s = turn_s
        self._sitters: list[Sitter] = []
        self._line: list[Sitter] = []
        self._asked: set[Sitter] = set()

    async def take(self, who: Sitter) -> None:
        """Returns when ``who`` has a seat; first come, first served."""
        self._asked.discard(who)
        if who in self._sitters:  # it was to leave, and could not
            return
        self._line.append(who)
        try:
            while self._number is not None:
                if self._line[0] is who and len(self._sitters) < self._number:
                    break
                if self._line[0] is who and not self._asked:
                    self._ask_one()
                await asyncio.sleep(_LOOK_S)
            self._sitters.append(who)
        finally:
            self._line.remove(who)

    def leave(self, who: Sitter) -> None:
        """Gives a seat up; harmless without one."""
        if who in self._sitters:
            self._sitters.remove(who)
        self._asked.discard(who)

    def _ask_one(self) -> None:
        movable = [sitter for sitter in self._sitters if sitter.movable]
        idle = [sitter for sitter in movable if sitter.idle_s() >= _IDLE_S]
        done = [sitter for sitter in movable if sitter.awake_s() >= self._turn_s]
        if idle:
            chosen = max(idle, key=lambda sitter: sitter.idle_s())
        elif done:
            chosen = max(done, key=lambda sitter: sitter.awake_s())
        else:
            return
        self._asked.add(chosen)
        chosen.ask_to_sleep()
