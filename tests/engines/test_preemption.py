"""KVCACHED_PREEMPT=on: an engine above its fair share preempts for one that waits."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from harness import MIB, PROMPTS, Load, Pair, wait_until

PREEMPTIONS = "vllm:num_preemptions_total"


@pytest.fixture(scope="module")
def preempting(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("preempting")
    pair = Pair(model, folder, 12 * MIB, KVCACHED_PREEMPT="on")
    yield pair.up()
    pair.close()


def test_who_is_above_its_share_preempts_and_answers_stay_right(
    preempting: Pair, plain: list[list[int]]
) -> None:
    """A's requests alone would fill the device; then B needs more than nothing of it."""
    a, b, share = preempting.a, preempting.b, preempting.capacity // 2
    with Load(a, 16) as load:
        wait_until(lambda: preempting.account(a).in_use > share + share // 2, 60, "a is full")
        before = a.metric(PREEMPTIONS)
        with ThreadPoolExecutor(12) as pool:
            answers = pool.map(lambda i: (i, b.ask(PROMPTS[i], 60)), range(4, 16))
            waited = wait_until(
                lambda: preempting.account(b).charge > share // 2, 60, "b has memory"
            )
            wait_until(lambda: preempting.account(a).charge <= share + MIB, 60, "a has shrunk")
            asked = list(answers)
        print(f"b had half its share after {waited:.1f} s")
    assert a.metric(PREEMPTIONS) > before
    assert load.failures() == [] and load.wrong(plain) == []
    assert [i for i, answer in asked if answer.tokens != plain[i][:60]] == []
    assert preempting.ledger.snapshot().high_water <= preempting.capacity
