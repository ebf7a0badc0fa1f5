"""The application behind the one address: what is passed on to engines, and what is answered here.

An ASGI application, to be run by ``server.make_server``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import kvcached
from kvcached.router import admission, memory
from kvcached.router.engines import NO_HEADERS, Engines, Limits
from kvcached.router.errors import ApiError, form, not_found
from kvcached.router.exchange import Receive, Scope, Send
from kvcached.router.forward import ENDPOINTS, Forward
from kvcached.router.keys import Access, Keys
from kvcached.router.line import Line
from kvcached.router.memory import Pressure
from kvcached.router.metrics import CONTENT_TYPE, Metrics
from kvcached.router.openapi import description
from kvcached.router.queues import Gate
from kvcached.router.settings import ServeSettings
from kvcached.router.upstream import Upstream

logger = logging.getLogger(__name__)

Status = Callable[[], Mapping[str, Any]]


def _nothing() -> Mapping[str, Any]:
    return {}


class Router:
    """The whole application. Used on one event loop."""

    def __init__(
        self,
        settings: ServeSettings,
        upstreams: Sequence[Upstream],
        *,
        status: Status = _nothing,
        pressure: Pressure | None = None,
        limits: Limits | None = None,
        engine_headers: Mapping[str, str] = NO_HEADERS,
    ) -> None:
        """``upstreams`` has one engine for each of the settings' models, in any order. ``status``
        is what the supervisor says of them. Without ``pressure`` memory is never short.
        ``engine_headers`` go with every request to an engine.
        """
        by_name = {upstream.name: upstream for upstream in upstreams}
        lines = [Line(by_name[m.name], m.queue, m.slo) for m in settings.models]
        self.gate = Gate(lines, admission.POLICIES[settings.scheduling])
        self.metrics = Metrics(self.gate)
        self._settings = settings
        self._names = {name: model.name for model in settings.models for name in model.names}
        self._keys = Keys(settings.api_keys, self._names)
        self._status = status
        self._pressure = pressure
        self._limits = limits or Limits()
        self._engine_headers = engine_headers
        self._began_s = int(time.time())
        self._forward: Forward | None = None
        self._pages = self._other_pages()
        self._outer: Callable[[Scope, Receive, Send], Any] = self._dispatch
        if settings.cors_origins:
            self._outer = CORSMiddleware(
                self._dispatch,
                allow_origins=settings.cors_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
                expose_headers=["X-Request-Id", "Retry-After"],
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        await self._outer(scope, receive, send)

    async def _dispatch(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._forward is not None and scope["path"] in ENDPOINTS:
            await self._forward(scope, receive, send)
        else:
            await self._pages(scope, receive, send)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        del app
        engines = Engines(self._limits, self.metrics.retried, self._engine_headers)
        self._forward = Forward(
            *(self.gate, self._names, self._keys, engines),
            *(self.metrics, self._limits, self._settings.max_body),
        )
        follower = asyncio.get_running_loop().create_task(self._follow_memory())
        follower.add_done_callback(_followed)
        try:
            yield
        finally:
            self._forward = None
            follower.cancel()
            self.gate.close()
            await engines.close()

    async def _follow_memory(self) -> None:
        while self._pressure is not None:
            if self._pressure.look():
                self.gate.follow(self._pressure.short)
            await asyncio.sleep(memory.EVERY_S)

    # -- What is answered here ------------------------------------------------------------------

    def _other_pages(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/models", self._list_models),
                Route("/v1/models/{model:path}", self._one_model),
                Route("/health", _health),
                Route("/metrics", self._metrics_text),
                Route("/status", self._status_page),
                Route("/openapi.json", self._openapi),
            ],
            exception_handlers={HTTPException: _http_error, ApiError: _api_error},
            lifespan=self._lifespan,
        )

    def _access(self, request: Request) -> Access:
        authorization = request.headers.get("authorization")
        return self._keys.access(None if authorization is None else authorization.encode("latin-1"))

    def _operator(self, request: Request) -> None:
        """Raises ApiError 401 or 403: what concerns all models is for who may use all of them."""
        if self._access(request).models is not None:
            text = "This API key opens some models only."
            raise ApiError(403, text, "not_allowed", kind="permission_error")

    def _model(self, name: str) -> dict[str, Any]:
        card = {"id": name, "object": "model", "created": self._began_s, "owned_by": "kvcached"}
        model = self._names[name]
        return card if name == model else {**card, "root": model}

    async def _list_models(self, request: Request) -> Response:
        access = self._access(request)
        found = [self._model(n) for n, model in self._names.items() if access.may_use(model)]
        return JSONResponse({"object": "list", "data": found})

    async def _one_model(self, request: Request) -> Response:
        access, name = self._access(request), request.path_params["model"]
        if name not in self._names or not access.may_use(self._names[name]):
            raise not_found(name)
        return JSONResponse(self._model(name))

    async def _metrics_text(self, request: Request) -> Response:
        self._operator(request)
        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def _status_page(self, request: Request) -> Response:
        self._operator(request)
        return JSONResponse({**self._status(), "queues": self.queues()})

    def queues(self) -> dict[str, dict[str, Any]]:
        """What the router knows of each model."""
        return {
            line.name: {
                "state": line.upstream.state.value,
                "waiting": len(line.waiting),
                "running": line.running,
                "admitted": line.admitted,
                "short_of_memory": self.gate.short.get(line.name),
                "prefill_1000_tokens_s": round(line.estimate.seconds(1000), 6),
            }
            for line in self.gate.lines.values()
        }

    async def _openapi(self, request: Request) -> Response:
        del request
        names = None if self._settings.api_keys else [*self._names]
        return JSONResponse(description(kvcached.__version__, names))


def _followed(follower: asyncio.Task[None]) -> None:
    """A fault of ours must not go unseen: without the ledgers memory seems never to be short."""
    if not follower.cancelled() and (error := follower.exception()) is not None:
        logger.critical("the router does not follow the ledgers any more", exc_info=error)


async def _health(request: Request) -> Response:
    del request
    return JSONResponse({"status": "ok"})


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        text = f"There is no {request.url.path} here."
    else:
        text = f"{request.method} {request.url.path}: {error.detail}"
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    answer = form(text, "invalid_request_error", None, code)
    return JSONResponse(answer, error.status_code, headers=error.headers)


async def _api_error(request: Request, error: Exception) -> Response:
    del request
    assert isinstance(error, ApiError)
    headers = {name.decode(): value.decode() for name, value in error.headers}
    return Response(error.body(), error.status, headers, "application/json")
