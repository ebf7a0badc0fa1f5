"""What running requests are about to do: end, and leave room for others, or take another block."""

from __future__ import annotations

from collections.abc import Iterable

LOOK_AHEAD = 3
"""Steps: as many pages as a step's prompts take are mapped in two or three steps of decoding."""
LATE = 1
"""Steps that a request stays after its last one, where its output comes while the next one runs."""


class Course:
    """Of requests that generate one token a step, as many as they may. One that ends earlier, or
    was preempted, or whose prompt takes several steps, is expected at the wrong time: this is for
    guesses that cost little.
    """

    def __init__(self, block_tokens: int) -> None:
        self._step = 0
        self._ending: dict[int, list[str]] = {}  # requests by the step in which their place is free
        # A request takes a block whenever the step's number has its remainder by block_tokens.
        self._remainders: dict[str, int] = {}
        self._growing = [0] * block_tokens  # how many requests have each remainder

    def leave(self, gone: Iterable[str]) -> None:
        """Requests that are no longer there, whether they had all their tokens or not."""
        for name in gone:
            self._stops(name)

    def begin_step(self, new: Iterable[tuple[str, int, int]]) -> None:
        """A step that computes tokens, and brings in requests, each with the tokens of its prompt
        and the most that it may generate.
        """
        self._step += 1
        self._ending.pop(self._step - LATE - 1, None)
        for name, prompt, most in new:
            self._stops(name)
            self._ending.setdefault(self._step + most, []).append(name)
            # The next step computes the first token after the prompt.
            remainder = (self._step + 1 - prompt) % len(self._growing)
            self._remainders[name] = remainder
            self._growing[remainder] += 1
        for name in self._ending.get(self._step + 1, ()):
            self._stops(name)

    def ending(self) -> int:
        """Requests whose places become free in the next steps, or have just done so."""
        soon = range(self._step - LATE, self._step + LOOK_AHEAD + 1)
        return sum(len(self._ending.get(step, ())) for step in soon)

    def growing(self) -> int:
        """Requests that need a block more in the next step."""
        return self._growing[(self._step + 1) % len(self._growing)]

    def _stops(self, name: str) -> None:
        remainder = self._remainders.pop(name, None)
        if remainder is not None:
            self._growing[remainder] -= 1
