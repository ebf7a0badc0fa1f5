"""Engines and clients that break off, hang or are slow: honest errors, the others are served, and
nothing is left behind.
"""

from __future__ import annotations

import gc
import json
import logging
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest
from router_runs import Running, ToyEngine, running, wait_until

from kvcached.router.engines import IDLE_S, Limits

URL = "/v1/completions"


def events(router: Running, **body: Any) -> list[str]:
    """What follows ``data:`` in each event of a stream."""
    asked = {"model": "a", "stream": True, **body}
    answer = httpx.post(router.url + URL, json=asked, timeout=20)
    assert answer.status_code == 200, answer.text
    parts = answer.text.split("\n\n")
    assert parts[-1] == ""
    return [part.removeprefix("data: ") for part in parts[:-1]]


def code(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["code"])


@pytest.fixture(autouse=True)
def nothing_is_left(router: Running, engines: list[ToyEngine]) -> Iterator[None]:
    """After each test the tasks, queues and uses of the router are as they were before it."""
    httpx.post(router.url + URL, json={"model": "b"}).raise_for_status()
    tasks = router.tasks()
    yield
    wait_until(lambda: router.tasks() <= tasks, 5, "tasks have ended")
    for line in router.router.gate.lines.values():
        assert (line.running, line.before_first_token, len(line.waiting)) == (0, 0, 0)
        assert line.upstream.used == 0  # type: ignore[attr-defined]
    for engine in engines:
        if engine.process.poll() is None:
            wait_until(lambda e=engine: e.seen()["running"] == 0, 5, "no request is left there")


def test_a_stream_that_breaks_ends_with_an_error_and_never_as_if_it_were_done(
    router: Running,
) -> None:
    *parts, last = events(router, words=5, end="break")
    assert [json.loads(part)["n"] for part in parts] == list(range(5))
    assert json.loads(last)["error"]["code"] == "engine_failed"


def test_an_error_is_an_event_of_its_own_after_half_an_event(router: Running) -> None:
    *_, half, last = events(router, words=2, end="half")
    assert half == '{"n":'
    assert json.loads(last)["error"]["code"] == "engine_failed"


def test_a_stream_that_hangs_ends_with_a_timeout(router: Running) -> None:
    *parts, last = events(router, words=2, end="hang")
    assert len(parts) == 2
    assert json.loads(last)["error"]["code"] == "engine_timeout"


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_breaks_off_before_its_answer_is_not_asked_twice(
    router: Running, engines: list[ToyEngine], stream: bool
) -> None:
    before = len(engines[0].seen()["order"])
    answer = httpx.post(router.url + URL, json={"model": "a", "end": "refuse", "stream": stream})
    assert answer.status_code == 502 and code(answer) == "engine_failed"
    assert len(engines[0].seen()["order"]) == before + 1


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_says_nothing_is_a_timeout(router: Running, stream: bool) -> None:
    answer = httpx.post(router.url + URL, json={"model": "a", "first_s": 60, "stream": stream})
    assert answer.status_code == 504 and code(answer) == "engine_timeout"


def test_an_answer_that_breaks_off_is_not_taken_for_the_whole(router: Running) -> None:
    small = {"model": "a", "end": "break", "bytes": 100}
    answer = httpx.post(router.url + URL, json=small)
    assert answer.status_code == 502 and code(answer) == "engine_failed"
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.post(router.url + URL, json={**small, "bytes": 4 << 20})


def test_a_killed_engine_costs_its_own_requests_and_nobody_elses(
    router: Running, engines: list[ToyEngine]
) -> None:
    slow = {"model": "a", "stream": True, "words": 1000, "gap_s": 0.01}
    with ThreadPoolExecutor(8) as pool:
        ours = [pool.submit(events, router, **slow) for _ in range(4)]
        others = [pool.submit(events, router, **{**slow, "model": "b", "words": 100})]
        wait_until(lambda: engines[0].seen()["running"] == 4, 5, "all four run")
        engines[0].kill()
        for future in ours:
            assert json.loads(future.result()[-1])["error"]["code"] == "engine_failed"
        assert others[0].result()[-1] == "[DONE]" and len(others[0].result()) == 101
    answer = httpx.post(router.url + URL, json={"model": "a"})
    assert answer.status_code == 503 and code(answer) == "model_unavailable"
    assert int(answer.headers["retry-after"]) >= 1
    suspicions = router.router.gate.lines["a"].upstream.suspicions  # type: ignore[attr-defined]
    assert any("no connection" in reason for reason in suspicions)


def test_a_request_whose_engine_takes_no_connection_is_sent_once_it_does(
    engines: list[ToyEngine],
) -> None:
    patient = Limits(first_retry_s=0.5, retries=5)
    with running(engines, patient) as router, ThreadPoolExecutor(1) as pool:
        engines[0].kill()
        asked = pool.submit(events, router, mark="again")
        upstream = router.router.gate.lines["a"].upstream
        wait_until(lambda: upstream.suspicions, 5, "refused")  # type: ignore[attr-defined]
        engines[0].start()
        assert asked.result()[-1] == "[DONE]"
        assert engines[0].seen()["order"] == ["again"]
        assert 'retries_total{model="a"}' in httpx.get(router.url + "/metrics").text


def test_a_stopped_engine_is_a_timeout_and_the_other_is_served(
    router: Running, engines: list[ToyEngine]
) -> None:
    engines[0].process.send_signal(signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(
                httpx.post, router.url + URL, json={"model": "a", "stream": True}, timeout=20
            )
            while not asked.done():
                start = time.monotonic()
                assert events(router, model="b")[-1] == "[DONE]"
                assert time.monotonic() - start < 0.5
        assert asked.result().status_code == 504
    finally:
        engines[0].process.send_signal(signal.SIGCONT)


def test_a_service_that_ends_finishes_what_it_can_and_says_so_to_the_others(
    engines: list[ToyEngine],
) -> None:
    """What is short enough for ``drain_s`` (2 s here) is finished."""
    with running(engines, Limits()) as router, ThreadPoolExecutor(3) as pool:
        short = pool.submit(events, router, words=20, gap_s=0.05)
        long = pool.submit(events, router, words=1000, gap_s=0.05)
        silent = pool.submit(
            httpx.post, router.url + URL, json={"model": "b", "first_s": 60}, timeout=20
        )
        wait_until(lambda: router.router.gate.lines["a"].running == 2, 5, "they run")
        wait_until(lambda: router.router.gate.lines["b"].running == 1, 5, "it runs")
        router.server.should_exit = True
        assert len(short.result()) == 21 and short.result()[-1] == "[DONE]"
        assert json.loads(long.result()[-1])["error"]["code"] == "shutting_down"
        assert silent.result().status_code == 503 and code(silent.result()) == "shutting_down"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_the_engines_work_at_once(
    router: Running, engines: list[ToyEngine], stream: bool
) -> None:
    cancelled = engines[0].seen()["cancelled"]
    body = {"model": "a", "stream": stream, "words": 3 if stream else 0, "first_s": 0}
    body |= {"end": "hang"} if stream else {"first_s": 60}
    text = json.dumps(body)
    head = f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", router.port)) as client:
        client.sendall((head + f"Content-Length: {len(text)}\r\n\r\n{text}").encode())
        if stream:
            assert client.recv(100)
        wait_until(lambda: engines[0].seen()["running"] == 1, 5, "it runs")
    start = time.monotonic()
    wait_until(lambda: engines[0].seen()["cancelled"] == cancelled + 1, 5, "cancelled")
    assert time.monotonic() - start < 0.5


def test_a_client_that_takes_nothing_does_not_hold_its_engine(
    router: Running, engines: list[ToyEngine]
) -> None:
    cancelled = engines[0].seen()["cancelled"]
    text = json.dumps({"model": "a", "stream": True, "words": 10**7})
    head = f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", router.port)) as client:
        client.sendall((head + f"Content-Length: {len(text)}\r\n\r\n{text}").encode())
        wait_until(lambda: engines[0].seen()["cancelled"] == cancelled + 1, 15, "given up")
    metrics = httpx.get(router.url + "/metrics").text
    assert 'broken_answers_total{cause="stalled",model="a"} 1.0' in metrics


def test_clients_that_come_and_go_leave_nothing(
    router: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """Descriptors, tasks and memory after many requests that end in every way."""
    caplog.set_level(logging.ERROR)  # what pytest keeps of the log is not the router's memory
    endings: list[dict[str, Any]] = [
        *({"end": "break"}, {"end": "half"}, {"end": "refuse"}, {"words": 20, "gap_s": 0.001}),
        *({"status": 500, "answer": "no"}, {"model": "nobody"}, {"stream": False}),
    ]
    process = psutil.Process()

    def some(seed: int) -> None:
        with httpx.Client(timeout=20) as client:
            for number in range(40):
                body = {"model": "a", "stream": True, **endings[(seed + number) % len(endings)]}
                with client.stream("POST", router.url + URL, json=body) as answer:
                    if (seed + number) % 3:  # else it goes away now
                        answer.read()

    def one_round() -> tuple[int, int]:
        threads = [threading.Thread(target=some, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_until(lambda: router.tasks() <= 3, 5, "tasks have ended")
        time.sleep(2 * IDLE_S + 0.5)  # idle connections to engines are looked at so often
        gc.collect()
        return process.num_fds(), process.memory_info().rss

    one_round()
    fds, rss = one_round()
    fds_after, rss_after = one_round()
    assert fds_after <= fds + 2, f"{fds} descriptors became {fds_after}"
    assert rss_after - rss < 4 << 20, f"{rss} bytes grew to {rss_after}"
