"""Simulated engines that share a simulated GPU; see ``kvcached.bench.simulate``.

An engine keeps vLLM's manners: continuous batching, prompts in chunks beside what is decoded, the
request that came last preempted where one that runs cannot go on. Engines with work take turns on
the GPU, a few steps at a time. Nothing is kept for each token: a request's end is known as a number
of decoding steps.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from kvcached.bench.sim_memory import Memory
from kvcached.bench.sim_shapes import Device, Shape

STEP_TOKENS = 8192
MAX_RUNNING = 256
HALF_BLOCK = 8
"""Tokens by which the last block of a request is not full, on average."""
STEPS_ALONE, STEPS_SHARED = 16, 4
"""Decoding steps until the GPU looks again for arrivals and for others' work."""


@dataclass(eq=False, slots=True)
class Request:
    """One request. Times in simulated seconds; None: not reached."""

    at_s: float
    prompt: int
    output: int
    first_s: float | None = None
    end_s: float | None = None
    done: int = 0
    """Tokens generated before a preemption: they are computed again, with the prompt."""
    since: int = 0  # the engine's step count when it began to decode
    left: int = 0  # tokens of its prompt that are not computed yet
    failed: bool = False
    preempted: int = 0

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_s is None else self.first_s - self.at_s

    @property
    def tpot_s(self) -> float | None:
        if self.first_s is None or self.end_s is None or self.output < 2:
            return None
        return (self.end_s - self.first_s) / (self.output - 1)


class Engine:
    """One model's engine on a GPU, at ``index`` of its memory."""

    def __init__(
        self,
        shape: Shape,
        device: Device,
        memory: Memory,
        index: int,
        requests: Sequence[Request],
    ) -> None:
        self.requests = requests
        self._shape, self._device, self._memory, self._index = shape, device, memory, index
        self._next = 0
        self._waiting: deque[Request] = deque()
        self._late: list[Request] = []  # came when the next step was scheduled already
        self._prefilling: deque[Request] = deque()
        self._decoding: list[Request] = []  # in the order in which they began
        self._ends: list[tuple[int, int, Request]] = []
        self._steps = 0
        self._context = 0  # tokens of all that decode
        self._held = 0  # tokens of all that run
        self._order = 0
        self._short = False  # its next request waits for memory

    def next_arrival_s(self) -> float | None:
        """When the next request arrives that has not; None after the last."""
        return self.requests[self._next].at_s if self._next < len(self.requests) else None

    def arrive(self, now: float) -> None:
        while self._next < len(self.requests) and self.requests[self._next].at_s <= now:
            request = self.requests[self._next]
            self._next += 1
            if self._bytes(request.prompt + request.output, 1) > self._memory.most(self._index):
                request.failed = True
            elif self._decoding or self._prefilling:
                self._late.append(request)
            else:
                self._waiting.append(request)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._late or self._prefilling or self._decoding)

    @property
    def oldest_s(self) -> float:
        """When the first of the requests that wait arrived."""
        return (self._waiting or self._late)[0].at_s

    def work(self, now: float, most_steps: int, soon_s: float | None = None) -> float:
        """Up to so many steps, and no longer than until ``soon_s``, when the next request arrives;
        returns how long they take, 0 where memory is missing for any.
        """
        if not self._decoding and not self._prefilling:
            self._look()
        self._admit()
        if self._late:  # they join the step after this one
            most_steps = 1
        if soon_s is not None and most_steps > 1 and self._decoding:
            one_s = self._shape.step_s(self._device, self._context, 0, len(self._decoding))
            most_steps = max(1, min(most_steps, math.ceil((soon_s - now) / one_s)))
        steps = self._decoding_steps(most_steps)
        chunk = self._chunk()
        if not self._decoding and not chunk:
            return 0.0
        batch = len(self._decoding)
        context = self._context + batch * (steps - 1) // 2
        requests = batch + len(self._prefilling)
        took = steps * self._shape.step_s(self._device, context, chunk, requests)
        self._steps += steps
        self._context += steps * batch
        self._held += steps * batch
        self._look()
        self._computed(chunk, now + took)
        self._finish(now + took)
        return took

    def _look(self) -> None:
        """Sees what came since the step before was scheduled: engines schedule a step ahead."""
        self._waiting += self._late
        self._late.clear()

    def _admit(self) -> None:
        while self._waiting and not self._memory.closed(self._index):
            if len(self._decoding) + len(self._prefilling) >= MAX_RUNNING:
                break
            request = self._waiting[0]
            tokens = request.prompt + request.done
            self._short = not self._memory.ensure(self._index, self._now_bytes(tokens, 1))
            if self._short:
                return
            self._waiting.popleft()
            request.left = tokens
            self._held += tokens
            self._prefilling.append(request)
        self._short = False
        self._settle()

    def _decoding_steps(self, most: int) -> int:
        """How many steps can be taken at once; preempts where not even one can."""
        if self._prefilling:
            most = 1
        if self._ends:
            most = max(1, min(most, self._ends[0][0] - self._steps))
        while self._decoding:
            need = self._now_bytes(most * len(self._decoding), 0)
            if self._memory.ensure(self._index, need):
                return most
            if most > 1:
                most = 1
                continue
            self._preempt()
        return 1

    def _preempt(self) -> None:
        victim = self._prefilling.pop() if self._prefilling else self._decoding.pop()
        made = 0 if victim.left else self._steps - victim.since
        self._held -= victim.prompt + victim.done + made
        if not victim.left:
            self._context -= victim.prompt + victim.done + made
            victim.done += made
            victim.since = -1  # its end is void
        victim.preempted += 1
        self._waiting.appendleft(victim)
        self._settle()

    def _chunk(self) -> int:
        room = STEP_TOKENS - len(self._decoding)
        return min(room, sum(request.left for request in self._prefilling))

    def _computed(self, chunk: int, now: float) -> None:
        while self._prefilling and chunk >= self._prefilling[0].left:
            request = self._prefilling.popleft()
            chunk -= request.left
            request.left = 0
            if request.first_s is None:
                request.first_s = now
                request.done = 1
                self._held += 1
            if request.done >= request.output:
                self._release(request, now, request.prompt + request.done)
                continue
            request.since = self._steps
            self._context += request.prompt + request.done
            self._decoding.append(request)
            self._order += 1
            end = self._steps + request.output - request.done
            heapq.heappush(self._ends, (end, self._order, request))
        if self._prefilling:
            self._prefilling[0].left -= chunk

    def _finish(self, now: float) -> None:
        while self._ends and self._ends[0][0] <= self._steps:
            end, _, request = heapq.heappop(self._ends)
            if request.since < 0 or request.since + request.output - request.done != end:
                continue  # preempted since
            self._decoding.remove(request)
            tokens = request.prompt + request.output
            self._context -= tokens
            self._release(request, now, tokens)
        self._settle()

    def _release(self, request: Request, now: float, tokens: int) -> None:
        request.end_s = now
        self._held -= tokens

    def _settle(self) -> None:
        self._memory.settle(self._index, self._now_bytes(), self._short)

    def _now_bytes(self, more_tokens: int = 0, more_requests: int = 0) -> int:
        running = len(self._decoding) + len(self._prefilling) + more_requests
        return self._bytes(self._held + more_tokens, running)

    def _bytes(self, tokens: int, requests: int) -> int:
        return (tokens + HALF_BLOCK * requests) * self._shape.token_bytes


def play(engines: Sequence[Engine], until_s: float, at_once: int = 1) -> None:
    """Plays one GPU's engines until then, or until all requests have ended. ``at_once`` of them
    take steps at the same time.
    """
    turn = 0
    busy: dict[int, float] = {}  # until when, by engine
    lanes = [0.0] * at_once  # when each is free
    while lanes and lanes[0] < until_s:
        now = heapq.heappop(lanes)
        busy = {index: end for index, end in busy.items() if end > now}
        for index, engine in enumerate(engines):
            if index not in busy:  # a step does not look for arrivals
                engine.arrive(now)
        ready = [i for i, engine in enumerate(engines) if engine.has_work and i not in busy]
        arrivals = [at_s for engine in engines if (at_s := engine.next_arrival_s()) is not None]
        soon_s = min(arrivals, default=None)
        most = STEPS_ALONE if len(ready) == 1 else STEPS_SHARED
        turn += 1
        took = 0.0
        for offset in range(len(ready)):
            index = ready[(turn + offset) % len(ready)]
            took = engines[index].work(now, most, soon_s)
            if took > 0:
                busy[index] = now + took
                heapq.heappush(lanes, now + took)
                break
        if took > 0:
            continue
        later = [*busy.values(), *(at_s for at_s in arrivals if at_s > now)]
        if later:
            heapq.heappush(lanes, min(later))
        elif ready:
            raise RuntimeError(f"nobody can go on at {now:.1f} s: memory was lost")
