"""The load generator: streams completions and times every token."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import httpx

from kvcached.demo.trace import Request

REQUEST_LIMIT_S = 300.0


@dataclass(slots=True)
class Result:
    """What became of one request. Times in seconds of the monotonic clock; None: not reached."""

    request: Request
    sent_s: float = 0.0
    first_s: float | None = None
    last_s: float | None = None
    tokens: list[int] = field(default_factory=list)
    arrivals_s: list[float] = field(default_factory=list)
    """When tokens came: one or more at each."""
    error: str | None = None

    @property
    def ok(self) -> bool:
        return self.error is None and len(self.tokens) == self.request.max_tokens

    @property
    def ttft_ms(self) -> float | None:
        return None if self.first_s is None else (self.first_s - self.sent_s) * 1e3

    @property
    def tpot_ms(self) -> float | None:
        """Mean time between tokens after the first."""
        if self.first_s is None or self.last_s is None or len(self.tokens) < 2:
            return None
        return (self.last_s - self.first_s) / (len(self.tokens) - 1) * 1e3


@dataclass(frozen=True, slots=True)
class Target:
    """Where an engine's requests go."""

    url: str
    model: str


Observer = Callable[[Result, str], None]
"""Called in the event loop with a result and "sent", "first" or "done"."""


def play(
    load: Sequence[Request],
    targets: Mapping[str, Target],
    observe: Observer | None = None,
    paced: bool = True,
) -> list[Result]:
    """Sends the requests at their times (at once when not ``paced``) and returns all results.

    A failed request is a result with ``error`` set, never an exception. Blocks the caller.
    """
    return asyncio.run(_play(load, targets, observe or (lambda result, event: None), paced))


async def _play(
    load: Sequence[Request], targets: Mapping[str, Target], observe: Observer, paced: bool
) -> list[Result]:
    results = [Result(request) for request in load]
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(timeout=REQUEST_LIMIT_S, limits=limits) as client:
        start = time.monotonic()

        async def one(result: Result) -> None:
            if paced:
                await asyncio.sleep(max(0.0, start + result.request.at_s - time.monotonic()))
            result.sent_s = time.monotonic()
            observe(result, "sent")
            try:
                await _stream(client, targets[result.request.engine], result, observe)
            except (httpx.HTTPError, ValueError, KeyError) as error:
                result.error = f"{type(error).__name__}: {error}"
            observe(result, "done")

        await asyncio.gather(*(one(result) for result in results))
    return results


async def _stream(
    client: httpx.AsyncClient, target: Target, result: Result, observe: Observer
) -> None:
    body = {
        "model": target.model,
        "prompt": list(result.request.prompt),
        "max_tokens": result.request.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    async with client.stream("POST", target.url + "/v1/completions", json=body) as response:
        if response.status_code != 200:
            text = (await response.aread()).decode(errors="replace")
            raise ValueError(f"HTTP {response.status_code}: {text[:300]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise ValueError(f"the engine answered {event['error']}")
            for choice in event["choices"]:
                _take(result, choice.get("token_ids") or [], observe)
    if len(result.tokens) != result.request.max_tokens:
        raise ValueError(f"{len(result.tokens)} tokens of {result.request.max_tokens}")


def _take(result: Result, tokens: list[int], observe: Observer) -> None:
    if not tokens:
        return
    result.last_s = time.monotonic()
    result.arrivals_s.append(result.last_s)
    result.tokens.extend(tokens)
    if result.first_s is None:
        result.first_s = result.last_s
        observe(result, "first")
