"""Models that have a simulated GPU one at a time, as with sleep and wake; see ``bench.simulate``.

The one that is awake has all memory that its weights leave. It goes to sleep when it has no work.
When it has had some seconds and others have waited as long, it starts no further request and ends
those that run (sleeping engines keep no KV cache); the one that has waited longest wakes.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvcached.bench.sim_engine import STEPS_ALONE, Engine
from kvcached.bench.sim_shapes import Shape

PATIENCE_S = 2.0
LOAD_BYTES_PER_S = 16.06e9 / 0.7
"""Waking an 8B model takes 0.7 s (Prism, arXiv 2505.04021, measured on its own system)."""


class OneAwake:
    """Memory of the one that is awake; ``totals`` is what each has then."""

    def __init__(self, totals: Sequence[int]) -> None:
        self.awake = 0
        self.hurry = False
        self._totals = list(totals)

    def ensure(self, index: int, size_bytes: int) -> bool:
        return index == self.awake and size_bytes <= self._totals[index]

    def settle(self, index: int, size_bytes: int, waits: bool) -> None:
        pass

    def closed(self, index: int) -> bool:
        return index != self.awake or self.hurry

    def most(self, index: int) -> int:
        return self._totals[index]


def wake_s(shape: Shape) -> float:
    """How long a model takes to wake; going to sleep is free."""
    return shape.weight_bytes / LOAD_BYTES_PER_S


def play_in_turns(
    engines: Sequence[Engine], shapes: Sequence[Shape], memory: OneAwake, until_s: float
) -> None:
    """Plays one GPU's engines until then, or until all requests have ended."""
    now = woken_s = 0.0
    while now < until_s:
        for engine in engines:
            engine.arrive(now)
        waiting = {
            index: engine.oldest_s
            for index, engine in enumerate(engines)
            if index != memory.awake and engine.has_work
        }
        current = engines[memory.awake]
        if not waiting and not current.has_work:
            arrivals = [at_s for engine in engines if (at_s := engine.next_arrival_s()) is not None]
            if not arrivals:
                return
            now = min(arrivals)
            continue
        memory.hurry = now - woken_s > PATIENCE_S and any(
            now - since > PATIENCE_S for since in waiting.values()
        )
        took = current.work(now, STEPS_ALONE) if current.has_work else 0.0
        if took == 0.0:
            memory.awake = min(waiting, key=lambda index: waiting[index])
            memory.hurry = False
            took = wake_s(shapes[memory.awake])
            woken_s = now + took
        now += took
