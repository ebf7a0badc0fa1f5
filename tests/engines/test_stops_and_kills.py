"""One of each: the death of any process ends its instance, and its neighbour does not notice."""

from __future__ import annotations

import random

import chaos
import pytest
from harness import Pair

KINDS = ("api", "core", "worker")


@pytest.mark.parametrize("what", ["core", "worker"])
def test_a_stopped_process_goes_on_correctly(pair: Pair, plain: list[list[int]], what: str) -> None:
    p99_s = chaos.stop(pair, what, after_s=0.7, for_s=1.0, expected=plain)
    print(f"stop {what}: B's TTFT p99 {p99_s * 1e3:.0f} ms")


@pytest.mark.parametrize("what", KINDS)
def test_the_death_of_one_process_ends_the_instance(
    pair: Pair, plain: list[list[int]], what: str
) -> None:
    killed = chaos.kill(pair, what, after_s=0.7, expected=plain)
    # That it happens; how fast is measured by make chaos, on a machine that does nothing else.
    print(killed)


def many(pair: Pair, plain: list[list[int]]) -> None:
    """Ten kills and ten stops of each kind at random moments."""
    random_ = random.Random(20)
    quiet_s = chaos.undisturbed(pair, 30.0, plain)
    print(f"undisturbed: B's TTFT p99 {quiet_s * 1e3:.0f} ms")
    todo = [(kind, event) for kind in KINDS for event in ("kill", "stop") for _ in range(10)]
    random_.shuffle(todo)
    for what, event in todo:
        after_s = random_.uniform(0.05, 2.5)
        if event == "stop":
            p99_s = chaos.stop(pair, what, after_s, random_.uniform(0.2, 2.0), plain)
            print(f"stop {what}: B's TTFT p99 {p99_s * 1e3:.0f} ms", flush=True)
        else:
            killed = chaos.kill(pair, what, after_s, plain)
            print(killed, flush=True)
            assert killed.gone_s < chaos.END_LIMIT_S and killed.free_s < 0.1
            p99_s = killed.b_p99_s
            pair.up()
        assert p99_s <= 2 * quiet_s or event == "stop", (what, event, p99_s, quiet_s)


@pytest.mark.slow
def test_many_stops_and_kills(pair: Pair, plain: list[list[int]]) -> None:
    many(pair, plain)


test_many_stops_and_kills.limit_s = 7200.0  # type: ignore[attr-defined]
