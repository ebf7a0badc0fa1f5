"""The admission's policies: as many as possible on time, nobody starves, and what they gain."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcached.router.admission import (
    OLDEST_EVERY,
    WINDOW,
    Job,
    Policy,
    by_deadline,
    deadlines,
    fifo,
)

# Whole numbers, so that sums of them are exact and a deadline is met or missed beyond doubt.
durations = st.integers(1, 12)
dues = st.one_of(st.integers(0, 40), st.just(math.inf))


@st.composite
def jobs(draw: st.DrawFn, most: int = 7) -> list[Job]:
    pairs = draw(st.lists(st.tuples(durations, dues), max_size=most))
    numbers = draw(st.permutations(range(len(pairs))))
    return [Job(n, d, due) for n, (d, due) in zip(numbers, pairs, strict=True)]


def on_time(order: list[Job] | tuple[Job, ...], start_s: float) -> int:
    ends = itertools.accumulate((job.prefill_s for job in order), initial=start_s)
    return sum(end <= job.deadline_s for end, job in zip(list(ends)[1:], order, strict=True))


@given(jobs(), st.integers(0, 10))
def test_no_order_has_more_requests_on_time(waiting: list[Job], start: int) -> None:
    first, others = by_deadline(waiting, start)
    assert on_time(first, start) == len(first)
    assert len(first) == max(on_time(p, start) for p in itertools.permutations(waiting))
    assert sorted(j.number for j in first + others) == sorted(j.number for j in waiting)
    assert [j.number for j in others] == sorted(j.number for j in others)


@given(jobs(40), st.integers(0, 10))
def test_the_order_on_time_is_by_deadline(waiting: list[Job], start: int) -> None:
    first, _ = by_deadline(waiting, start)
    assert [j.deadline_s for j in first] == sorted(j.deadline_s for j in first)
    assert on_time(first, start) == len(first)


@given(jobs(40), st.integers(0, 1000))
def test_without_objectives_deadlines_are_fifo(waiting: list[Job], turn: int) -> None:
    left = [Job(j.number, j.prefill_s) for j in waiting]
    while left:
        chosen = deadlines(left, 0.0, turn)
        assert chosen == fifo(left, 0.0, turn)
        left.remove(chosen)
        turn += 1


@settings(deadline=None)
@given(
    st.integers(0, 12),
    st.integers(0, OLDEST_EVERY - 1),
    st.lists(st.tuples(durations, st.integers(1, 30)), min_size=1, max_size=200),
)
def test_nobody_starves(older: int, turn: int, newcomers: list[tuple[int, int]]) -> None:
    """A request that is hopelessly late and longer than all others, under a stream of others that
    can be on time: after each admission another one comes.
    """
    waiting = [Job(n, 5.0, 0.0) for n in range(older)]
    victim = Job(older, 1000.0, 0.0)
    waiting.append(victim)
    now_s = 0.0
    for count in range(1, OLDEST_EVERY * (older + 1) + 1):
        duration, slack = newcomers[count % len(newcomers)]
        waiting.append(Job(older + count, duration, now_s + duration + slack))
        chosen = deadlines(waiting, now_s, turn)
        turn += 1
        if chosen == victim:
            return
        waiting.remove(chosen)
        now_s += chosen.prefill_s
    pytest.fail(f"still waits after {OLDEST_EVERY * (older + 1)} admissions")


def test_a_long_queue_is_ordered_by_its_oldest_part() -> None:
    queue = [Job(n, 0.001, 10.0 + (n % 7)) for n in range(WINDOW)]
    newest = Job(WINDOW, 0.001, 1.0)  # the only one that is due at once
    assert deadlines([*queue[1:], newest], 0.0, 0) == newest
    assert deadlines([*queue, newest], 0.0, 0) != newest


def simulated(policy: Policy, seed: int, load: float) -> tuple[float, float]:
    """The part of requests on time, and the longest wait: two models, chats with short prompts and
    a tight objective beside documents with long ones, on one device at ``load`` of its speed.
    """
    dice = random.Random(seed)
    now_s, arrivals = 0.0, []
    for number in range(3000):
        short = dice.random() < 0.8
        prefill = dice.expovariate(1 / 0.05) if short else dice.expovariate(1 / 0.6)
        now_s += dice.expovariate(load / (0.8 * 0.05 + 0.2 * 0.6))
        arrivals.append((now_s, Job(number, prefill, now_s + (0.5 if short else 3.0))))
    waiting: list[Job] = []
    came: dict[int, float] = {}
    clock_s, met, longest_s, turn = 0.0, 0, 0.0, 0
    pending = iter([*arrivals, (math.inf, Job(-1, 0.0))])
    at_s, job = next(pending)
    while waiting or at_s < math.inf:
        while at_s <= clock_s:
            waiting.append(job)
            came[job.number] = at_s
            at_s, job = next(pending)
        if not waiting:
            clock_s = at_s
            continue
        chosen = policy(waiting, clock_s, turn)
        turn += 1
        waiting.remove(chosen)
        longest_s = max(longest_s, clock_s - came[chosen.number])
        clock_s += chosen.prefill_s
        met += clock_s <= chosen.deadline_s
    return met / len(arrivals), longest_s


@pytest.mark.parametrize("load", [0.7, 0.95, 1.2])
def test_deadlines_keep_more_requests_on_time_than_fifo(load: float) -> None:
    for seed in range(3):
        plain, _ = simulated(fifo, seed, load)
        ours, _ = simulated(deadlines, seed, load)
        print(f"load {load}, seed {seed}: on time fifo {plain:.1%}, deadlines {ours:.1%}")
        assert ours > plain
