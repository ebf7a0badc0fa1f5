"""Requests that are about to end."""

from __future__ import annotations

from kvcached.engines.ends import LATE, LOOK_AHEAD, Ends


def test_requests_are_expected_to_end_with_the_last_token_that_they_may_generate() -> None:
    ends = Ends()
    ends.begin_step([10, 10, 11])
    said = []
    for _ in range(20):
        said.append(ends.soon())
        ends.begin_step([])
    first = 10 - LOOK_AHEAD  # step 1 gives the first token, and in step 11 two places are free
    assert said[:first] == [0] * first
    assert said[first : first + 2] == [2, 3]
    last = 11 + LATE
    assert said[last:] == [1] + [0] * (19 - last)
    assert ends._at == {}, "nothing is kept of what is over"


def test_a_request_of_one_token_leaves_at_once() -> None:
    ends = Ends()
    ends.begin_step([1])
    assert ends.soon() == 1
