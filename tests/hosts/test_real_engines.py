"""Two hosts with real vLLM engines; one is killed under load, its model comes back on the other."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from two_hosts import NAMES, ROOT, Cluster, Served, wait_until

from kvcached.demo.servers import ENGINE_ENVIRONMENT

pytestmark = [pytest.mark.engine, pytest.mark.slow]
MIB = 1 << 20
MODELS = ("a", "b")
START_LIMIT_S = 240.0
PROMPTS = [[(i * 11 + j * 17) % 990 + 5 for j in range(30 + 25 * i)] for i in range(4)]
MAX_TOKENS = 24


def settings(cluster: Cluster, model: Path) -> dict[str, Any]:
    arguments = {"dtype": "float32", "enforce-eager": True, "block-size": 32}
    arguments |= {"max-model-len": 1024, "max-num-seqs": 16}
    return {
        "listen": "127.0.0.1:0",
        "hosts": {"ray": cluster.address, "nodes": list(NAMES), "lost_after_s": 5.0},
        "environment": {**ENGINE_ENVIRONMENT, "KVCACHED_VIRTUAL": str(64 * MIB)},
        "models": [
            {
                "name": name,
                "model": str(model),
                "python": sys.executable,
                "arguments": arguments,
                "start": "at once",
                "load": {"tokens_per_s": 100},
                "health": {"every_s": 1.0, "timeout_s": 20.0},
            }
            for name in MODELS
        ],
    }


@pytest.fixture
def served(cluster: Cluster, tmp_path: Path) -> Iterator[Served]:
    model = tmp_path / "model"
    program = [sys.executable, str(ROOT / "tests/engines/tiny_model.py"), str(model)]
    subprocess.run(program, check=True, capture_output=True, timeout=300)
    found = Served(tmp_path, cluster.environment, settings(cluster, model))
    try:
        for name in MODELS:
            ready = f"{name} is ready"
            wait_until(lambda name=name: found.ready(name), ready, START_LIMIT_S)  # type: ignore[misc]
        yield found
    finally:
        code = found.end()
        print(found.output())
    assert code == 0


def ask(served: Served, model: str, prompt: list[int]) -> tuple[int, Any]:
    """The status, and the tokens or the error's code."""
    more = {"max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}
    answer = served.ask(model, prompt=prompt, return_token_ids=True, **more)
    found = answer.json()
    if answer.status_code == 200:
        return 200, found["choices"][0]["token_ids"]
    return answer.status_code, found["error"]["code"]


class Client:
    """Asks a model one prompt after the other, from a thread of its own."""

    def __init__(self, served: Served, model: str) -> None:
        self.answers: list[tuple[float, float, int, int, Any]] = []
        """Sent and answered when, which prompt, with which status and what."""
        self._ends = threading.Event()
        self._served, self._model = served, model
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._ends.is_set():
            number = len(self.answers) % len(PROMPTS)
            sent_s = time.monotonic()
            status, what = ask(self._served, self._model, PROMPTS[number])
            self.answers.append((sent_s, time.monotonic(), number, status, what))

    def __enter__(self) -> Client:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def answered_since(self, moment_s: float) -> list[float]:
        """When requests were answered that were sent later than this."""
        rows = list(self.answers)
        return [
            end_s for sent_s, end_s, _, status, _ in rows if status == 200 and sent_s > moment_s
        ]


@pytest.mark.parametrize("victim", NAMES)
def test_a_killed_hosts_model_answers_from_the_other(
    served: Served, cluster: Cluster, victim: str
) -> None:
    other = next(name for name in NAMES if name != victim)
    places = served.places()
    (moves,) = (name for name in MODELS if places[name] == [victim])
    (stays,) = (name for name in MODELS if places[name] == [other])
    right = [ask(served, stays, prompt)[1] for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in right}) == len(PROMPTS)
    (untouched,) = served.engines(stays)
    with Client(served, moves) as client, Client(served, stays) as neighbour:
        wait_until(lambda: len(client.answers) > 4, "requests are answered", 60)
        killed_s = time.monotonic()
        assert cluster.kill(victim)
        wait_until(lambda: served.places()[moves] == [other], "it is placed anew", 30)
        placed_s = time.monotonic() - killed_s
        wait_until(lambda: client.answered_since(killed_s), "it answers", START_LIMIT_S)
        back_s = client.answered_since(killed_s)[0] - killed_s
        seen = len(neighbour.answers)
        wait_until(lambda: len(neighbour.answers) > seen, "the neighbour answers", 60)
    print(f"placed anew after {placed_s:.2f} s, the first answer after {back_s:.2f} s")
    for _, _, number, status, what in (*client.answers, *neighbour.answers):
        assert status != 200 or what == right[number]
    assert {status for _, _, _, status, _ in neighbour.answers} == {200}
    # Only what was with the killed engine, and it says so; what came later waited for the start.
    errors = [each[3:] for each in client.answers if each[3] != 200]
    assert errors in ([], [(502, "engine_failed")])
    (after,) = served.engines(stays)
    assert (after["host"], after["pid"]) == (other, untouched["pid"])
    cluster.start(victim)  # for the next test
    wait_until(lambda: served.hosts() == sorted(NAMES), "the host is back", 60)
