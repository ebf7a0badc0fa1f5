"""Whose prompt is computed next where a device's memory is short. Pure functions.

The device is taken as one machine that computes one prompt after the other, and a request is on
time when its prompt is done by its deadline for the first token. The rule of Moore and Hodgson
(J. M. Moore, "An n job, one machine sequencing algorithm for minimizing the number of late jobs",
Management Science 15(1), 1968) finds an order in which as many as possible are on time: take
requests by deadline, and whenever one would be late, put off the longest taken so far. Using it
for deadlines of the first token is the idea of Prism (arXiv 2505.04021).

By itself the rule starves: who is put off stays behind everyone who can still be on time. So every
``OLDEST_EVERY``-th admission is the oldest request's, whatever its deadline: who has n older
requests before it is admitted after at most ``OLDEST_EVERY * (n + 1)`` admissions.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

OLDEST_EVERY = 8
"""Of so many admissions one is the oldest request's."""
WINDOW = 512
"""So many requests, the oldest ones, are put in order; an order costs about a microsecond each."""


@dataclass(frozen=True, slots=True)
class Job:
    """A request that waits. Times are seconds of one clock."""

    number: int
    """Arrivals counted up: the smallest one is the oldest."""
    prefill_s: float
    """How long its prompt is expected to take."""
    deadline_s: float = math.inf
    """When its first token is due; infinite without an objective."""


def by_deadline(jobs: Iterable[Job], start_s: float) -> tuple[list[Job], list[Job]]:
    """Divides jobs into those that can be on time, in the order in which they are, and the others,
    oldest first, when the first one begins at ``start_s``. No order has more of them on time.
    """
    taken: list[tuple[float, int, Job]] = []  # a heap, the longest first
    late: list[Job] = []
    end_s = start_s
    for job in sorted(jobs, key=_deadline):
        heapq.heappush(taken, (-job.prefill_s, -job.number, job))
        end_s += job.prefill_s
        if end_s > job.deadline_s:
            longest = heapq.heappop(taken)[2]
            end_s -= longest.prefill_s
            late.append(longest)
    on_time = sorted((entry[2] for entry in taken), key=_deadline)
    return on_time, sorted(late, key=_number)


def _deadline(job: Job) -> tuple[float, int]:
    return (job.deadline_s, job.number)


def _number(job: Job) -> int:
    return job.number


Policy = Callable[[Sequence[Job], float, int], Job]
"""Chooses among waiting jobs (at least one), now, at the n-th admission so far."""


def fifo(jobs: Sequence[Job], now_s: float, turn: int) -> Job:
    """The oldest one: what the other policy is compared with."""
    del now_s, turn
    return min(jobs, key=_number)


def deadlines(jobs: Sequence[Job], now_s: float, turn: int) -> Job:
    """The first one of an order in which most are on time; in its turn, the oldest one."""
    if turn % OLDEST_EVERY == OLDEST_EVERY - 1:
        return fifo(jobs, now_s, turn)
    if len(jobs) > WINDOW:
        jobs = heapq.nsmallest(WINDOW, jobs, key=_number)
    on_time, late = by_deadline(jobs, now_s)
    return on_time[0] if on_time else late[0]


POLICIES: Mapping[str, Policy] = MappingProxyType({"deadlines": deadlines, "fifo": fifo})
"""By the names that settings give them."""
