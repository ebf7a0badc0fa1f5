"""The router in front of two real engines that share one budget: OpenAI's client, vLLM's own
serving benchmark, clients that go away, engines that are killed or stopped.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from harness import PROMPTS, TWO_LONGEST_BYTES, Load, Pair, Server, wait_until

from kvcached.observe import Observer
from kvcached.router.app import Router
from kvcached.router.engines import Limits
from kvcached.router.fixed import FixedUpstream
from kvcached.router.memory import Pressure

sys.path.append(str(Path(__file__).resolve().parents[1] / "router"))
from router_runs import Running, serve_settings

TOKENS = 24
GREEDY = {"max_tokens": TOKENS, "temperature": 0.0}
EXACT = {"ignore_eos": True, "return_token_ids": True}


class Through(Server):
    """A server of the pair, asked through the router."""

    def __init__(self, name: str, router: Running) -> None:
        self.name = name
        self._router = router

    @property
    def url(self) -> str:
        return self._router.url


@pytest.fixture
def router(pair: Pair) -> Iterator[Running]:
    upstreams = [FixedUpstream(server.name, server.url) for server in (pair.a, pair.b)]
    limits = Limits(silence_s=60.0, retries=0)
    with Observer(pair.ledger_directory) as observer:
        pressure = Pressure.of(observer)
        router = Router(serve_settings(), upstreams, limits=limits, pressure=pressure)
        with Running(router) as started:
            yield started


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=60)


def complete(url: str, model: str, index: int, stream: bool) -> tuple[str, list[int]]:
    """What OpenAI's client makes of a completion."""
    with client(url) as asking:
        arguments: dict[str, Any] = {**GREEDY, "model": model, "prompt": PROMPTS[index]}
        if not stream:
            answer = asking.completions.create(**arguments, extra_body=EXACT)
            (choice,) = answer.choices
            return choice.text, choice.token_ids  # type: ignore[attr-defined]
        text, tokens = "", []
        for event in asking.completions.create(**arguments, stream=True, extra_body=EXACT):
            for choice in event.choices:
                text += choice.text
                tokens += choice.token_ids or []  # type: ignore[attr-defined]
        return text, tokens


@pytest.mark.parametrize("stream", [False, True])
def test_openais_client_gets_what_it_gets_directly(
    pair: Pair, router: Running, plain: list[list[int]], stream: bool
) -> None:
    for index in range(6):
        for server in (pair.a, pair.b):
            through = complete(router.url, server.name, index, stream)
            assert through == complete(server.url, server.name, index, stream)
            assert through[1] == plain[index][:TOKENS]
    with client(router.url) as asking:
        assert [model.id for model in asking.models.list()] == ["a", "first", "b"]
        with pytest.raises(openai.NotFoundError, match="does not exist here"):
            asking.completions.create(model="c", prompt="x")
        with pytest.raises(openai.APIStatusError) as refused:
            asking.embeddings.create(model="a", input="x")
        assert refused.value.body["message"]  # type: ignore[index, call-overload]
        with pytest.raises(openai.BadRequestError):
            asking.completions.create(model="a", prompt=[5] * 5000, max_tokens=1, stream=stream)


def test_both_under_load_answer_as_alone(
    pair: Pair, router: Running, plain: list[list[int]]
) -> None:
    short: set[str] = set()

    def both_have_answered() -> bool:
        short.update(router.router.gate.short)
        return min(len(a.answers), len(b.answers)) >= 24

    with Load(Through("a", router), 6) as a, Load(Through("b", router), 6) as b:
        wait_until(both_have_answered, 120, "both answer")
    assert short == {"a", "b"}  # so the lines of both were one, at least for a while
    for load in (a, b):
        assert load.failures() == [] and load.wrong(plain) == []
    assert pair.ledger.snapshot().high_water <= pair.capacity


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_engine(
    pair: Pair, router: Running, stream: bool
) -> None:
    body = {"model": "a", "prompt": PROMPTS[0], "stream": stream, **GREEDY, **EXACT}
    body["max_tokens"] = 3000
    # By the ledger: on busy cores a server answers its metrics seconds late.
    account = pair.account(pair.a)
    whole = body["max_tokens"] // account.block_tokens * account.block_bytes
    seen = [0]

    def rests() -> bool:
        seen.append(pair.account(pair.a).in_use)
        return seen[-1] <= account.pinned  # that is in use at all times

    asking = http.client.HTTPConnection("127.0.0.1", router.port)
    asking.request(
        *("POST", "/v1/completions", json.dumps(body)), {"Content-Type": "application/json"}
    )
    wait_until(lambda: not rests(), 60, "it runs")
    asking.close()
    took_s = wait_until(rests, 60, "aborted")
    print(f"aborted {took_s * 1e3:.0f} ms after the client went away")
    assert max(seen) < whole * 9 // 10, "it ran to its end"


def test_an_engine_that_is_stopped_or_killed_is_its_own_affair(
    pair: Pair, router: Running, plain: list[list[int]]
) -> None:
    core = pair.pids(pair.a)["core"]
    with (
        pair.guaranteed(pair.b, TWO_LONGEST_BYTES),
        Load(Through("b", router), 2, TOKENS) as b,
        Load(Through("a", router), 4) as a,
    ):
        wait_until(lambda: len(a.answers) >= 4, 60, "a answers")
        os.kill(core, signal.SIGSTOP)
        seen = len(b.answers)
        wait_until(lambda: len(b.answers) >= seen + 20, 40, "b answers while a is stopped")
        os.kill(core, signal.SIGCONT)
        done = len(a.answers)
        wait_until(lambda: len(a.answers) >= done + 4, 60, "a goes on")
        assert a.failures() == []
        os.kill(core, signal.SIGKILL)
        wait_until(lambda: len(a.failures()) >= 8, 30, "a's requests fail")
        seen = len(b.answers)
        wait_until(lambda: len(b.answers) >= seen + 20, 60, "b answers when a is dead")
    assert b.failures() == [] and b.wrong(plain) == [] and a.wrong(plain) == []
    for said in a.failures():
        assert "engine" in said.lower(), said  # the router of it, or vLLM of its "EngineCore"
    # A client has its answer's last byte a moment before the router's thread counts it as over.
    for name, line in router.router.gate.lines.items():
        wait_until(lambda line=line: not line.running, 20, f"nobody is with {name}'s engine")  # type: ignore[misc]
        assert not line.waiting


def test_vllms_own_benchmark(pair: Pair, router: Running, model: Path, tmp_path: Path) -> None:
    vllm = str(Path(sys.executable).with_name("vllm"))
    command = [vllm, "bench", "serve", "--backend", "openai", "--base-url", router.url]
    command += ["--model", "a", "--tokenizer", str(model), "--dataset-name", "random"]
    command += ["--random-input-len", "32", "--random-output-len", "16", "--num-prompts", "40"]
    command += ["--request-rate", "20", "--ignore-eos", "--save-result"]
    command += ["--result-dir", str(tmp_path), "--disable-tqdm"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    print({key: result[key] for key in ("completed", "median_ttft_ms", "p99_ttft_ms")})
    assert result["completed"] == 40
