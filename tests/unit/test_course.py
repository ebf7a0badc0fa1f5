"""Requests that are about to end, or to take another block."""

from __future__ import annotations

import random

from kvcached.engines.course import LATE, LOOK_AHEAD, Course


def test_requests_are_expected_to_end_with_the_last_token_that_they_may_generate() -> None:
    course = Course(16)
    course.begin_step([("a", 5, 10), ("b", 6, 10), ("c", 7, 11)])
    said = []
    for _ in range(20):
        said.append(course.ending())
        course.begin_step([])
    first = 10 - LOOK_AHEAD  # step 1 gives the first token, and in step 11 two places are free
    assert said[:first] == [0] * first
    assert said[first : first + 2] == [2, 3]
    last = 11 + LATE
    assert said[last:] == [1] + [0] * (19 - last)
    assert course._ending == {}, "nothing is kept of what is over"


def test_a_request_of_one_token_leaves_at_once() -> None:
    course = Course(1)
    course.begin_step([("a", 5, 1)])
    assert (course.ending(), course.growing()) == (1, 0)


def test_the_steps_in_which_requests_take_blocks_are_known() -> None:
    """Against an engine that counts the tokens of each request."""
    draw, block = random.Random(7), 16
    course = Course(block)
    tokens: dict[str, int] = {}  # whose keys and values are there
    left: dict[str, int] = {}
    early: set[str] = set()  # ended before they had all their tokens: the course learns it late
    grown = 0
    for step in range(2_000):
        takes = {name for name in {*left, *early} if tokens[name] % block == 0}
        assert course.growing() == len(takes), step
        grown += len(takes - early)
        for name in left:
            tokens[name] += 1
            left[name] -= 1
        new = [
            (f"{step}-{number}", draw.randrange(1, 100), draw.randrange(1, 80))
            for number in range(draw.randrange(3) if step % 300 < 200 else 0)
        ]
        course.leave(early)
        course.begin_step(new)
        tokens |= {name: prompt for name, prompt, _ in new}
        left |= {name: most - 1 for name, _, most in new}
        left = {name: more for name, more in left.items() if more}
        early = {name for name in left if draw.random() < 0.02}
        left = {name: more for name, more in left.items() if name not in early}
    assert grown > 500
    course.leave(tokens)
    assert course._remainders == {} and sum(course._growing) == 0, "nothing is kept of them"
