"""What becomes of a request: checked, queued, sent to its engine, its answer passed on as bytes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

import aiohttp

from kvcached.router import wanted
from kvcached.router.engines import BROKEN, Engines, Limits
from kvcached.router.errors import ApiError, ending, not_found, openai_form
from kvcached.router.exchange import Exchange, Receive, Room, Scope, Send
from kvcached.router.keys import Keys
from kvcached.router.line import Line, Ticket
from kvcached.router.metrics import NO_MODEL, Metrics
from kvcached.router.queues import Gate

logger = logging.getLogger(__name__)

ENDPOINTS = {
    "/v1/completions": "completions",
    "/v1/chat/completions": "chat",
    "/v1/embeddings": "embeddings",
}
"""The paths that are passed on, and what metrics call them."""
CLIENT_GONE = 499
"""The status in the metrics of a request whose client went away."""
_PASSED_TO_ENGINES = (b"accept", b"content-type", b"traceparent", b"tracestate", b"user-agent")
_PASSED_TO_CLIENTS = ("Content-Type", "Content-Encoding", "Cache-Control", "Retry-After")
_UNBUFFERED = (b"x-accel-buffering", b"no")
"""Tells proxies in front of the router to pass parts of a stream on at once."""
_BODIES = 8
"""So many of the largest bodies may wait at once."""
_SMALL = 1 << 20
"""An answer up to so many bytes is complete before any of it is sent on."""


class Forward:
    """The endpoint of all models: an ASGI application for the paths in ``ENDPOINTS``."""

    def __init__(
        self,
        gate: Gate,
        names: Mapping[str, str],
        keys: Keys,
        engines: Engines,
        metrics: Metrics,
        limits: Limits,
        max_body: int,
    ) -> None:
        """``names`` says which model a name or alias means; ``max_body`` is bytes."""
        self._gate = gate
        self._names = names
        self._keys = keys
        self._engines = engines
        self._metrics = metrics
        self._limits = limits
        self._max_body = max_body
        self._room = Room(_BODIES * max_body)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        model = NO_MODEL
        with Exchange(scope, receive, send, self._limits) as exchange:
            try:
                line, asked, body = await self._read(scope, exchange)
                model = line.name
                exchange.watched()
                await self._queue(scope["path"], exchange, line, asked, [body])
            except ApiError as error:
                await exchange.error(error)
            except asyncio.CancelledError:
                await self._cancelled(model, exchange)
        status = exchange.status or CLIENT_GONE
        self._metrics.over(model, ENDPOINTS[scope["path"]], status, loop.time() - began_s)

    async def _cancelled(self, model: str, exchange: Exchange) -> None:
        if not exchange.gone:  # the service ends and has waited long enough
            await exchange.break_off(ending())
        elif exchange.gone == "slow body":
            text = f"The next part of the body did not come within {self._limits.body_s:g} s."
            await exchange.error(ApiError(408, text, "body_timeout", kind="timeout_error"))
        elif exchange.status:
            self._metrics.broke(model, exchange.gone)

    async def _read(self, scope: Scope, exchange: Exchange) -> tuple[Line, wanted.Wanted, bytes]:
        """Which model, and what it is sent. Raises ApiError 400 to 415."""
        if scope["method"] != "POST":
            raise ApiError(405, "Only POST is allowed here.", "method_not_allowed")
        access = self._keys.access(exchange.headers.get(b"authorization"))
        # Without this a web page could send what a browser calls a simple request, CORS or not.
        kind = exchange.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            raise ApiError(415, "Expected Content-Type: application/json", "unsupported_media_type")
        body = await exchange.body(self._max_body, self._room)
        asked = wanted.read(body)
        model = self._names.get(asked.model)
        if model is None:
            raise not_found(asked.model)
        if not access.may_use(model):
            text = f"This API key may not use the model {asked.model!r}."
            raise ApiError(403, text, "model_not_allowed", kind="permission_error", param="model")
        if asked.model != model:
            body = wanted.renamed(body, model)
        return self._gate.lines[model], asked, body

    async def _queue(
        self, path: str, exchange: Exchange, line: Line, asked: wanted.Wanted, body: list[bytes]
    ) -> None:
        """``body`` holds the body, the only reference to it: it may be long, and answers too."""
        shows_first = asked.streams or path == "/v1/embeddings"
        ticket = self._gate.enter(line, asked.tokens, shows_first)
        try:
            await self._gate.turn(ticket)
            assert ticket.through_s is not None
            self._metrics.through(line.name, ticket.through_s - ticket.entered_s)
            answer = await self._engines.ask(
                ticket.upstream, path, body, _headers(exchange), line.queue.timeout_s
            )
            exchange.drop_body()
            try:
                await self._pass_on(path, exchange, ticket, answer)
            finally:
                answer.close()  # of an answer that is not complete, the connection: it is cancelled
        finally:
            self._gate.leave(ticket)

    async def _pass_on(
        self, path: str, exchange: Exchange, ticket: Ticket, answer: aiohttp.ClientResponse
    ) -> None:
        headers = _answer_headers(answer)
        length = answer.content_length
        events = answer.content_type == "text/event-stream"
        if answer.status < 400 and (events or length is None or length > _SMALL):
            if events:
                headers.append(_UNBUFFERED)
            elif length is not None:
                headers.append((b"content-length", str(length).encode()))
            await self._pass_parts(exchange, ticket, answer, headers)
            if events and ticket.first_s is not None:
                self._metrics.first(ticket.line.name, ticket.first_s - ticket.entered_s)
            return
        try:
            body = await answer.read()
        except BROKEN as error:
            raise self._engines.failed(ticket.upstream, error) from None
        self._gate.first_token(ticket)
        if answer.status >= 400:
            body = openai_form(ticket.line.name, path, answer.status, body)
            headers = [h for h in headers if h[0] != b"content-type"]
            headers.append((b"content-type", b"application/json"))
        await exchange.whole(answer.status, headers, body)

    async def _pass_parts(
        self,
        exchange: Exchange,
        ticket: Ticket,
        answer: aiohttp.ClientResponse,
        headers: list[tuple[bytes, bytes]],
    ) -> None:
        """Parts as they come. The head waits for the first of them: until then an engine that fails
        gives an honest status.
        """
        try:
            async for part in answer.content.iter_any():
                if not exchange.status:
                    self._gate.first_token(ticket)
                    await exchange.begin(answer.status, headers)
                await exchange.send(part)
        except BROKEN as error:
            failed = self._engines.failed(ticket.upstream, error)
            if exchange.status:
                logger.warning("request %s: %s", exchange.request_id, failed)
                self._metrics.broke(ticket.line.name, "engine")
            await exchange.break_off(failed)
            return
        if not exchange.status:
            await exchange.begin(answer.status, headers)
        await exchange.end()


def _headers(exchange: Exchange) -> dict[str, str]:
    """What an engine is told beside the body: no key, no cookie, nothing about the connection."""
    headers = {"X-Request-Id": exchange.request_id}
    for name in _PASSED_TO_ENGINES:
        value = exchange.headers.get(name)
        if value is not None:
            headers[name.decode()] = value.decode("latin-1")
    return headers


def _answer_headers(answer: aiohttp.ClientResponse) -> list[tuple[bytes, bytes]]:
    found = []
    for name in _PASSED_TO_CLIENTS:
        value = answer.headers.get(name)
        if value is not None:
            found.append((name.lower().encode(), value.encode("latin-1", "replace")))
    return found
