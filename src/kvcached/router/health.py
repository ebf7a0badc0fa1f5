"""Whether an engine that lives also answers, and whether it gets anywhere."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import httpx

_SAMPLE = re.compile(r"^(?P<name>[A-Za-z_:][\w:]*)(\{.*\})?\s+(?P<value>\S+)", re.MULTILINE)
# vLLM counts tokens at each step. SGLang does when a request is finished, which says nothing here.
_TOKENS = frozenset({"vllm:prompt_tokens_total", "vllm:generation_tokens_total"})
_RUNNING = "vllm:num_requests_running"


async def trouble(client: httpx.AsyncClient, url: str, timeout_s: float) -> str | None:
    """Why ``/health`` is not good now; None if it is."""
    try:
        answer = await client.get(url + "/health", timeout=timeout_s)
    except httpx.TimeoutException:
        return f"/health did not answer within {timeout_s:g} s"
    except httpx.HTTPError as error:
        return f"/health: {type(error).__name__} {error}".rstrip()
    return None if answer.is_success else f"/health answers {answer.status_code}"


@dataclass(frozen=True, slots=True)
class Progress:
    """What an engine's metrics say of its work."""

    running: float
    tokens: float


async def progress(client: httpx.AsyncClient, url: str, timeout_s: float) -> Progress | None:
    """Asks the engine's metrics; None where it has none or does not say."""
    try:
        answer = await client.get(url + "/metrics", timeout=timeout_s)
    except httpx.HTTPError:
        return None
    found = [(match["name"], match["value"]) for match in _SAMPLE.finditer(answer.text)]
    running = [float(value) for name, value in found if name == _RUNNING]
    tokens = [float(value) for name, value in found if name in _TOKENS]
    if not answer.is_success or not running or not tokens:
        return None
    return Progress(sum(running), sum(tokens))


class Stall:
    """How long an engine has been running requests without a further token."""

    def __init__(self) -> None:
        self._last: Progress | None = None
        self._since_s = time.monotonic()

    def seconds(self, now: Progress | None) -> float:
        """Takes a look at the engine; 0 where it works, rests or does not say."""
        moved = now is None or now.running == 0 or self._last is None
        if moved or (
            self._last is not None and now is not None and now.tokens != self._last.tokens
        ):
            self._since_s = time.monotonic()
        self._last = now
        return time.monotonic() - self._since_s


async def serves(client: httpx.AsyncClient, url: str, model: str, timeout_s: float) -> bool:
    """Whether the server says that it serves this model: its port could have gone to another."""
    try:
        answer = await client.get(url + "/v1/models", timeout=timeout_s)
        return any(each["id"] == model for each in answer.json()["data"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return False
