"""An engine that only streams (``python -m kvcached.bench.router_engine PORT``): what the router's
overhead is measured against. The request says how many ``words`` and seconds between (``gap_s``).
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import uvicorn

_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8")]
_WORD = (
    b'data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"m","choices":'
    b'[{"index":0,"text":" word","logprobs":null,"finish_reason":null}],"usage":null}\n\n'
)


async def app(scope: Any, receive: Any, send: Any) -> None:
    """ASGI."""
    body = b""
    more = True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    asked = json.loads(body) if body else {"words": 0, "gap_s": 0}
    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
    for _ in range(asked["words"]):
        await send({"type": "http.response.body", "body": _WORD, "more_body": True})
        await asyncio.sleep(asked["gap_s"])
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


if __name__ == "__main__":
    uvicorn.run(
        app, port=int(sys.argv[1]), loop="uvloop", http="httptools", lifespan="off",
        access_log=False, log_level="warning", timeout_keep_alive=75,
    )  # fmt: skip
