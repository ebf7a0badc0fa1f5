"""Requests that can never fit fail at once, with both numbers; nothing else waits for them."""

from __future__ import annotations

import re
import threading
import time

import httpx
from harness import PROMPTS, Answer, Pair


def ceiling_tokens(pair: Pair) -> int:
    """The most tokens that engine A can ever have: block 0 is vLLM's own."""
    account = pair.account(pair.a)
    return (account.ceiling // account.block_bytes - 1) * account.block_tokens


def test_a_prompt_above_the_ceiling_is_refused_at_once(pair: Pair, plain: list[list[int]]) -> None:
    most = ceiling_tokens(pair)
    start = time.monotonic()
    body = {"model": pair.a.name, "prompt": [7] * (most + 1), "max_tokens": 8}
    answer = httpx.post(pair.a.url + "/v1/completions", json=body, timeout=60)
    took = time.monotonic() - start
    assert answer.status_code == 400, answer.text
    assert took < 2.0
    for said in (answer.text, pair.a.ask([7] * (most + 1), 8).error):  # at once, and streaming
        assert re.search(rf"\b{most + 1} prompt tokens\b", said), said
        assert re.search(rf"\b{most} tokens\b", said), said
    assert pair.a.ask(PROMPTS[3], 40).tokens == plain[3][:40]


def test_a_request_that_outgrows_the_ceiling_fails_and_the_next_is_served(
    pair: Pair, plain: list[list[int]]
) -> None:
    prompt = [(i * 5) % 990 + 5 for i in range(ceiling_tokens(pair) - 70)]
    answers: list[Answer] = []
    thread = threading.Thread(target=lambda: answers.append(pair.a.ask(prompt, 200)))
    thread.start()
    time.sleep(0.5)
    small = pair.a.ask(PROMPTS[2], 24)  # while the other one grows
    thread.join()
    (large,) = answers
    assert small.tokens == plain[2][:24], small.error
    assert large.error and large.status in (200, 500), large
    assert len(large.tokens) < 200
    assert "it fails" in pair.a.log()
    assert pair.a.ask(PROMPTS[1], 24).tokens == plain[1][:24]
    assert pair.account(pair.a).demand == 0
