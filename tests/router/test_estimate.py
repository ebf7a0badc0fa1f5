"""The prefill estimate: learns a line, follows changes, never says something impossible."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcached.router.estimate import MIN_S, Estimate


def test_a_line_is_learned_in_spite_of_noise() -> None:
    dice = random.Random(3)
    estimate = Estimate()
    for _ in range(200):
        tokens = dice.uniform(10, 4000)
        estimate.observe(tokens, (0.03 + 0.0002 * tokens) * dice.uniform(0.9, 1.1))
    for tokens in (100, 1000, 4000):
        assert estimate.seconds(tokens) == pytest.approx(0.03 + 0.0002 * tokens, rel=0.15)


def test_a_change_of_speed_is_followed() -> None:
    estimate = Estimate()
    for speed in (1.0, 5.0):
        for count in range(150):
            tokens = 100 + 37 * (count % 20)
            estimate.observe(tokens, speed * tokens / 10_000)
    assert estimate.seconds(500) == pytest.approx(0.25, rel=0.1)


def test_prompts_of_one_length_teach_that_length() -> None:
    estimate = Estimate()
    for _ in range(300):
        estimate.observe(1000, 0.4)
    assert estimate.seconds(1000) == pytest.approx(0.4, rel=0.01)


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 600)), max_size=60),
    st.floats(0, 1e7),
)
def test_never_below_zero_and_never_less_for_more(
    seen: list[tuple[float, float]], tokens: float
) -> None:
    estimate = Estimate()
    for each in seen:
        estimate.observe(*each)
    assert estimate.seconds(tokens) >= MIN_S
    assert estimate.seconds(tokens + 1000) >= estimate.seconds(tokens)
