"""How many requests are about to end, and leave room for others in line."""

from __future__ import annotations

from collections.abc import Iterable

LOOK_AHEAD = 3
"""Steps: as many pages as a step's prompts take are mapped in two or three steps of decoding."""
LATE = 1
"""Steps that a request stays after its last one, where its output comes while the next one runs."""


class Ends:
    """Of requests that generate one token a step, as many as they may. One that ends earlier, or
    was preempted, or whose prompt takes several steps, is expected at the wrong time: this is for
    guesses that cost little.
    """

    def __init__(self) -> None:
        self._step = 0
        self._at: dict[int, int] = {}  # requests by the step in which their place is free

    def begin_step(self, most_tokens: Iterable[int]) -> None:
        """A step that brings in requests which may generate so many tokens."""
        self._step += 1
        self._at.pop(self._step - LATE - 1, None)
        for most in most_tokens:
            free = self._step + most
            self._at[free] = self._at.get(free, 0) + 1

    def soon(self) -> int:
        """Requests whose places become free in the next steps, or have just done so."""
        return sum(
            self._at.get(step, 0) for step in range(self._step - LATE, self._step + LOOK_AHEAD + 1)
        )
