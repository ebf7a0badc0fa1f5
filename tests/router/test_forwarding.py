"""Requests and answers through the router: what is passed on, and how errors look."""

from __future__ import annotations

import itertools
import json
import socket
import time
from typing import Any

import httpx
import pytest
from router_runs import Running, ToyEngine, running, wait_until

COMPLETIONS = "/v1/completions"


def ask(router: Running, path: str = COMPLETIONS, **body: Any) -> httpx.Response:
    return httpx.post(router.url + path, json={"model": "a", **body}, timeout=20)


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error of an answer, which must have OpenAI's form."""
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def test_streams_and_answers_are_passed_on_byte_by_byte(
    router: Running, engines: list[ToyEngine]
) -> None:
    for body in ({"stream": True, "words": 40}, {"bytes": 10}, {"bytes": 3 << 20}):
        for path in (COMPLETIONS, "/v1/chat/completions", "/v1/embeddings"):
            asked = {"model": "a", "messages": [], **body}
            direct = httpx.post(engines[0].url + path, json=asked)
            through = httpx.post(router.url + path, json=asked)
            assert through.status_code == direct.status_code == 200
            assert through.content == direct.content
            assert through.headers["content-type"] == direct.headers["content-type"]


def test_parts_of_a_stream_are_not_held_back(router: Running) -> None:
    body = {"model": "a", "stream": True, "words": 4, "gap_s": 0.2}
    times = []
    with httpx.stream("POST", router.url + COMPLETIONS, json=body, timeout=20) as answer:
        for _ in answer.iter_raw():
            times.append(time.monotonic())
    assert len(times) == 5
    assert all(after - before > 0.1 for before, after in itertools.pairwise(times))


def test_the_body_arrives_as_it_was_sent(router: Running, engines: list[ToyEngine]) -> None:
    odd = b'{"x":1e2 , "model" : "a","n":12345678901234567890, "s":"\\u00e4/\\/"}'
    headers = {"Content-Type": "application/json; charset=utf-8"}
    httpx.post(router.url + COMPLETIONS, content=odd, headers=headers).raise_for_status()
    assert engines[0].seen()["body"] == odd.decode()
    large = json.dumps({"model": "a", "image": "A" * (20 << 20)}).encode()
    httpx.post(router.url + COMPLETIONS, content=large, headers=headers).raise_for_status()
    assert engines[0].seen()["body"] == len(large)


def test_an_alias_is_replaced_and_all_else_kept(router: Running, engines: list[ToyEngine]) -> None:
    odd = b'{"x":1e2 , "model" : "first","n":12345678901234567890, "s":"\\u00e4/\\/"}'
    headers = {"Content-Type": "application/json"}
    httpx.post(router.url + COMPLETIONS, content=odd, headers=headers).raise_for_status()
    said = engines[0].seen()["body"]
    for part in ('"model":"a"', '"x":1e2', '"n":12345678901234567890', '"s":"\\u00e4/\\/"'):
        assert part in said


def test_models_go_to_their_own_engines(router: Running, engines: list[ToyEngine]) -> None:
    ask(router, mark="to a")
    ask(router, mark="to b", model="b")
    assert engines[0].seen()["order"][-1] == "to a"
    assert engines[1].seen()["order"][-1] == "to b"


def test_headers_are_chosen(router: Running, engines: list[ToyEngine]) -> None:
    headers = {"Authorization": "Bearer secret", "Cookie": "c=1", "X-Request-Id": "r-1", "TE": "x"}
    headers["traceparent"] = "00-1-2-3"
    answer = httpx.post(router.url + COMPLETIONS, json={"model": "a"}, headers=headers)
    assert answer.headers["x-request-id"] == "r-1"
    seen = engines[0].seen()["headers"]
    assert seen["x-request-id"] == "r-1" and seen["traceparent"] == "00-1-2-3"
    assert not {"authorization", "cookie", "te"} & seen.keys()


@pytest.mark.parametrize("bad", ["", "a b", "x" * 129, "ä"])
def test_a_request_id_that_cannot_be_trusted_is_replaced(router: Running, bad: str) -> None:
    headers = {b"X-Request-Id": bad.encode(), b"Content-Type": b"application/json"}
    answer = httpx.post(router.url + COMPLETIONS, content=b'{"model":"a"}', headers=headers)
    assert len(answer.headers["x-request-id"]) == 32


def test_what_is_wrong_with_a_request_is_said(router: Running) -> None:
    url = router.url + COMPLETIONS
    json_type = {"Content-Type": "application/json"}
    deep = b'{"model":"a","x":' + b"[" * 10**6
    cases: list[tuple[httpx.Response, int, str]] = [
        (ask(router, model="nobody"), 404, "model_not_found"),
        (httpx.post(url, content=b"{", headers=json_type), 400, "invalid_json"),
        (httpx.post(url, content=b"", headers=json_type), 400, "invalid_json"),
        (httpx.post(url, content=b'{"model":"a"}\xff', headers=json_type), 400, "invalid_json"),
        (httpx.post(url, content=deep, headers=json_type), 400, "invalid_json"),
        (httpx.post(url, content=b"[]", headers=json_type), 400, "invalid_body"),
        (httpx.post(url, content=b'{"model":7}', headers=json_type), 400, "invalid_body"),
        (httpx.post(url, json={"prompt": "x"}), 400, "invalid_body"),
        (httpx.post(url, content=b'{"model":"a"}'), 415, "unsupported_media_type"),
        (httpx.get(url), 405, "method_not_allowed"),
    ]
    for answer, status, code in cases:
        assert (answer.status_code, error_of(answer)["code"]) == (status, code)
    for path in ("/", "/v1", "/v1/models/nobody", "/v2/models"):
        answer = httpx.get(router.url + path)
        assert answer.status_code == 404 and answer.json()["error"]["message"]
    assert httpx.delete(router.url + "/v1/models").status_code == 405


def test_a_large_body_is_refused_while_it_comes(engines: list[ToyEngine]) -> None:
    with running(engines, max_body="1MiB") as router:
        too_large = b'{"model":"a","x":"' + b"A" * (1 << 20) + b'"}'

        def parts() -> Any:
            for start in range(0, len(too_large), 1 << 14):
                yield too_large[start : start + (1 << 14)]

        headers = {"Content-Type": "application/json"}
        for content in (too_large, parts()):  # with its length said before, and without
            answer = httpx.post(router.url + COMPLETIONS, content=content, headers=headers)
            assert answer.status_code == 413 and error_of(answer)["code"] == "request_too_large"
        with socket.create_connection(("127.0.0.1", router.port)) as client:
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            client.sendall((head + f"Content-Length: {10**18}\r\n\r\n").encode())
            client.settimeout(5)
            assert b" 413 " in client.recv(1000)  # before any of it came
        fits = b'{"model":"a","x":"' + b"A" * (1 << 19) + b'"}'
        httpx.post(router.url + COMPLETIONS, content=fits, headers=headers).raise_for_status()


def test_an_engines_error_has_openais_form(router: Running) -> None:
    ours = {"error": {"message": "too long", "type": "BadRequestError", "param": None, "code": 400}}
    answer = ask(router, status=400, answer=json.dumps(ours))
    assert answer.status_code == 400 and answer.json() == ours
    old = {"object": "error", "message": "too long", "type": "BadRequestError", "code": 400}
    answer = ask(router, status=400, answer=json.dumps(old))
    assert answer.status_code == 400 and answer.json()["error"]["message"] == "too long"
    answer = ask(router, "/v1/embeddings", status=404, answer='{"detail":"Not Found"}')
    assert error_of(answer)["code"] == "not_served"
    answer = ask(router, status=500, answer="Internal Server Error")
    assert answer.status_code == 500
    assert error_of(answer)["message"] == "Internal Server Error"


def test_models_are_listed(router: Running) -> None:
    listed = httpx.get(router.url + "/v1/models").json()
    assert listed["object"] == "list"
    assert [(m["id"], m.get("root")) for m in listed["data"]] == [
        *(("a", None), ("first", "a"), ("b", None))
    ]
    assert httpx.get(router.url + "/v1/models/first").json()["root"] == "a"
    assert httpx.get(router.url + "/health").json() == {"status": "ok"}


def test_connections_are_kept_on_both_sides(router: Running, engines: list[ToyEngine]) -> None:
    with httpx.Client() as client:
        for _ in range(20):
            answer = client.post(router.url + COMPLETIONS, json={"model": "a", "stream": True})
            assert answer.status_code == 200
        assert len(router.server.server_state.connections) == 1
    text = httpx.get(router.url + "/metrics").text
    assert 'requests_total{endpoint="completions",model="a",status="200"} 20.0' in text


def test_keys_open_what_they_may(
    engines: list[ToyEngine], caplog: pytest.LogCaptureFixture
) -> None:
    keys = [{"key": "k-all"}, {"key": "k-first", "models": ["first"]}]
    with running(engines, api_keys=keys) as router:

        def status(path: str, key: str | None, **body: Any) -> int:
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            if body:
                answer = httpx.post(router.url + path, json=body, headers=headers)
            else:
                answer = httpx.get(router.url + path, headers=headers)
            if answer.status_code >= 400:
                assert answer.json()["error"]["message"]
                assert not key or key not in answer.text
            return answer.status_code

        for path in ("/v1/models", "/metrics", "/status"):
            assert status(path, None) == 401
            assert status(path, "wrong") == 401
            assert status(path, "k-all") == 200
        assert status("/metrics", "k-first") == 403
        assert status("/health", None) == 200
        assert status(COMPLETIONS, None, model="a") == 401
        assert status(COMPLETIONS, "k-al", model="a") == 401
        assert status(COMPLETIONS, "k-all", model="b") == 200
        assert status(COMPLETIONS, "k-first", model="a") == 200
        assert status(COMPLETIONS, "k-first", model="b") == 403
        headers = {"Authorization": "Bearer k-first"}
        listed = httpx.get(router.url + "/v1/models", headers=headers).json()["data"]
        assert [m["id"] for m in listed] == ["a", "first"]
        unauthorized = httpx.post(router.url + COMPLETIONS, json={"model": "a"})
        assert unauthorized.headers["www-authenticate"] == "Bearer"
    assert "k-all" not in caplog.text and "k-first" not in caplog.text


def test_other_pages_may_use_it_only_where_that_was_said(engines: list[ToyEngine]) -> None:
    origin = {"Origin": "https://page.example"}
    preflight = {**origin, "Access-Control-Request-Method": "POST"}
    with running(engines) as router:
        answer = httpx.get(router.url + "/v1/models", headers=origin)
        assert not [name for name in answer.headers if name.startswith("access-control")]
        assert httpx.options(router.url + COMPLETIONS, headers=preflight).status_code == 405
    with running(engines, cors_origins=["https://page.example"]) as router:
        allowed = "access-control-allow-origin"
        answer = httpx.post(router.url + COMPLETIONS, json={"model": "a"}, headers=origin)
        assert answer.status_code == 200 and answer.headers[allowed] == "https://page.example"
        answer = httpx.options(router.url + COMPLETIONS, headers=preflight)
        assert answer.status_code == 200 and answer.headers[allowed] == "https://page.example"
        other = {**preflight, "Origin": "https://other.example"}
        assert httpx.options(router.url + COMPLETIONS, headers=other).status_code == 400


def test_a_body_that_does_not_come_is_not_waited_for(router: Running) -> None:
    with socket.create_connection(("127.0.0.1", router.port)) as client:
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        client.sendall((head + 'Content-Length: 100\r\n\r\n{"mod').encode())
        client.settimeout(5)
        assert b" 408 " in client.recv(1000)
    wait_until(lambda: router.tasks() <= 4, 5, "nothing is left")
