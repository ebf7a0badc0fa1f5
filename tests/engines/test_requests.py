"""Requests that can never fit fail at once, with both numbers; nothing else waits for them."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path

import httpx
from harness import (
    MIB,
    PROMPTS,
    Answer,
    LlmProcess,
    Load,
    Pair,
    switched_on,
    wait_until,
)


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
    print(f"refused after {took * 1e3:.0f} ms")
    assert answer.status_code == 400, answer.text
    for said in (answer.text, pair.a.ask([7] * (most + 1), 8).error):  # at once, and streaming
        assert re.search(rf"\b{most + 1} prompt tokens\b", said), said
        assert re.search(rf"\b{most} tokens\b", said), said
    assert pair.a.ask(PROMPTS[3], 40).tokens == plain[3][:40]


def said_numbers(text: str) -> tuple[int, int]:
    """The blocks that a request needs, and those that its instance can get."""
    found = re.search(r"needs (\d+) blocks of KV cache .* can get at most (\d+) blocks", text)
    assert found, text
    return int(found[1]), int(found[2])


def test_a_request_that_outgrows_the_ceiling_fails_and_the_next_is_served(
    pair: Pair, plain: list[list[int]]
) -> None:
    most = ceiling_tokens(pair)
    prompt = [(i * 5) % 990 + 5 for i in range(most - 70)]
    answers: list[Answer] = []
    thread = threading.Thread(target=lambda: answers.append(pair.a.ask(prompt, 200)))
    thread.start()
    time.sleep(0.5)
    small = pair.a.ask(PROMPTS[2], 24)  # while the other one grows
    thread.join()
    (large,) = answers
    assert small.tokens == plain[2][:24], small.error
    assert large.status == 200 and 0 < len(large.tokens) < 200, "it had begun to answer"
    needed, allowed = said_numbers(large.error)
    assert needed > allowed == most // pair.account(pair.a).block_tokens
    assert json.loads(large.error)["code"] == 400
    assert said_numbers(pair.a.log().rpartition(" fails: ")[2]) == (needed, allowed)
    assert pair.a.ask(PROMPTS[1], 24).tokens == plain[1][:24]
    assert pair.account(pair.a).demand == 0


def test_a_limit_lowered_below_a_running_request_ends_it_with_both_numbers(
    pair: Pair, plain: list[list[int]]
) -> None:
    """Of two samples both end, and what fits the new limit goes on."""
    account = pair.account(pair.a)
    prompt = [(i * 11) % 990 + 5 for i in range(1000)]
    body = {"model": "a", "prompt": prompt, "max_tokens": 3000, "ignore_eos": True, "n": 2}
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(httpx.post(f"{pair.a.url}/v1/completions", json=body, timeout=120))

    thread = threading.Thread(target=ask)
    with Load(pair.a, 2, max_tokens=24) as load:
        thread.start()
        limit = 12 * account.page_bytes
        # By the ledger: on busy cores a server answers no metrics for as long as both samples last.
        # The short requests alone hold less.
        wait_until(lambda: pair.account(pair.a).in_use >= 5 * limit // 2, 60, "both run")
        pair.ledger.set_limit("a", limit)
        try:
            thread.join(60)
            assert answers, "it did not end"
            answered = len(load.answers)
            wait_until(lambda: len(load.answers) > answered + 4, 60, "others go on")
        finally:
            pair.ledger.set_limit("a", None)
    (large,) = answers
    assert large.status_code == 400, large.text
    needed, allowed = said_numbers(large.text)
    assert needed > allowed == limit // account.block_bytes - 1
    assert load.failures() == [] and load.wrong(plain) == []
    wait_until(lambda: pair.a.metric("vllm:num_requests_running") == 0, 60, "no sample is left")


def test_a_caller_in_the_engines_process_finds_the_reason(model: Path, tmp_path: Path) -> None:
    job = {
        "task": "ends",
        "model": str(model),
        "prompts": [PROMPTS[2], PROMPTS[12]],
        "max_tokens": [40, 500],
        "above": 10,
        "limit": 8,
        "arguments": {},
    }
    changes = switched_on(
        tmp_path, 16 * MIB, KVCACHED_NAME="llm", VLLM_ENABLE_V1_MULTIPROCESSING="0"
    )
    with LlmProcess(tmp_path, job, changes) as process:
        small, large = process.answer(200)["ends"]
    assert small == [40, "length", None]
    tokens, finish, why = large
    needed, allowed = said_numbers(why)
    assert 0 < tokens < 500 and finish == "error" and needed > allowed
