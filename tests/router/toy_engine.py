"""A small HTTP server that streams like an engine (``python toy_engine.py PORT``).

What it does stands in the request: ``words`` (how many parts), ``gap_s`` between them, ``first_s``
before the first one, ``end``: ``done``, ``break`` (the connection is cut after the words), ``hang``
(nothing more comes), ``refuse`` (the connection is cut before an answer), ``half`` (as break, in
the middle of an event), ``status`` with ``answer``, ``bytes`` (a JSON answer of that size).
``GET /seen`` tells what came: running and cancelled requests, the last body and headers.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import uvicorn

seen: dict[str, Any] = {"running": 0, "cancelled": 0, "served": 0, "order": []}


class Cut(Exception):
    """Ends the connection."""


async def app(scope: Any, receive: Any, send: Any) -> None:
    assert scope["type"] == "http"
    if scope["path"] == "/seen":
        await whole(send, 200, json.dumps(seen).encode())
        return
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    asked = json.loads(body)
    seen["headers"] = {k.decode(): v.decode("latin-1") for k, v in scope["headers"]}
    seen["body"] = body.decode() if len(body) < 10_000 else len(body)
    seen["order"].append(asked.get("mark"))
    seen["running"] += 1
    gone = asyncio.create_task(receive())
    work = asyncio.create_task(answer(asked, send))
    try:
        await asyncio.wait((gone, work), return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
            seen["served"] += 1
        else:
            seen["cancelled"] += 1
    finally:
        seen["running"] -= 1
        gone.cancel()
        work.cancel()


async def answer(asked: dict[str, Any], send: Any) -> None:
    await asyncio.sleep(asked.get("first_s", 0))
    end = asked.get("end", "done")
    if end == "refuse":
        raise Cut
    if "status" in asked:
        said = asked["answer"]
        await whole(send, asked["status"], said.encode() if isinstance(said, str) else b"")
        return
    if not asked.get("stream"):
        size = asked.get("bytes", 0)
        text = json.dumps({"model": asked["model"], "text": "x" * size}).encode()
        if end == "break":
            headers = [(b"content-length", str(len(text)).encode())]
            await begin(send, 200, b"application/json", headers)
            await part(send, text[: len(text) // 2])
            raise Cut
        await whole(send, 200, text)
        return
    await begin(send, 200, b"text/event-stream; charset=utf-8")
    for number in range(asked.get("words", 3)):
        await part(send, b'data: {"n": %d}\n\n' % number)
        await asyncio.sleep(asked.get("gap_s", 0))
    if end == "half":
        await part(send, b'data: {"n":')
    if end in ("half", "break"):
        await asyncio.sleep(0.05)
        raise Cut
    if end == "hang":
        await asyncio.sleep(1000)
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def begin(send: Any, status: int, kind: bytes, more: Any = ()) -> None:
    headers = [(b"content-type", kind), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def part(send: Any, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def whole(send: Any, status: int, body: bytes) -> None:
    await begin(send, status, b"application/json", [(b"content-length", b"%d" % len(body))])
    await send({"type": "http.response.body", "body": body})


async def cutting(scope: Any, receive: Any, send: Any) -> None:
    try:
        await app(scope, receive, send)
    except Cut:
        # There is no way to do this in ASGI: the server's own cycle, of which send is a method.
        send.__self__.transport.abort()
        send.__self__.disconnected = True


if __name__ == "__main__":
    uvicorn.run(cutting, port=int(sys.argv[1]), log_level="error", lifespan="off")
