"""How an engine is put to sleep and woken: calls of its own HTTP server.

vLLM: /sleep, /wake_up and /is_sleeping, which it has with `--enable-sleep-mode` and
VLLM_SERVER_DEV_MODE=1. SGLang: /release_memory_occupation and /resume_memory_occupation, with
`--enable-memory-saver`. Nothing is with the engine while these run: the supervision sees to that.
"""

from __future__ import annotations

from typing import Any, Protocol

import httpx

from kvcached.errors import KvcachedError

CALL_LIMIT_S = 300.0
"""Weights go over the bus or come from a disk: seconds for what fits one GPU, minutes at worst."""


class SleepError(KvcachedError):
    """The engine did not fall asleep or did not wake; the message holds its answer."""


class Sleeper(Protocol):
    """An engine's own sleep mode."""

    async def fall_asleep(self, url: str) -> None:
        """Returns when it sleeps. Raises SleepError."""

    async def wake(self, url: str) -> None:
        """Returns when it can answer again. Raises SleepError."""


class VllmSleeper:
    """vLLM's levels: 1 keeps the weights in the host's memory, 2 reads them anew."""

    def __init__(self, client: httpx.AsyncClient, level: int) -> None:
        self._client = client
        self._level = level

    async def fall_asleep(self, url: str) -> None:
        await _post(self._client, f"{url}/sleep?level={self._level}")
        await self._expect(url, asleep=True)

    async def wake(self, url: str) -> None:
        if self._level == 1:
            await _post(self._client, url + "/wake_up")
        else:
            # The weights' memory first: reading them needs room that the KV cache would take.
            await _post(self._client, url + "/wake_up?tags=weights")
            await _post(self._client, url + "/collective_rpc", {"method": "reload_weights"})
            await _post(self._client, url + "/wake_up?tags=kv_cache")
        await self._expect(url, asleep=False)

    async def _expect(self, url: str, asleep: bool) -> None:
        answer = await _call(self._client, "GET", url + "/is_sleeping", None)
        if answer.json().get("is_sleeping") is not asleep:
            raise SleepError(f"/is_sleeping answers {answer.text} after the call returned")


class SglangSleeper:
    """SGLang's one kind of sleep. It wants no request to be under way, and checks that itself."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def fall_asleep(self, url: str) -> None:
        await _post(self._client, url + "/release_memory_occupation", {})

    async def wake(self, url: str) -> None:
        await _post(self._client, url + "/resume_memory_occupation", {})


def sleeper(engine: str, how: str, client: httpx.AsyncClient) -> Sleeper | None:
    """The engine's sleep mode where ``how`` means it; None for `kv`, `stop` and `never`."""
    if not how.startswith("engine-"):
        return None
    if engine == "sglang":
        return SglangSleeper(client)
    return VllmSleeper(client, int(how.removeprefix("engine-")))


async def _post(client: httpx.AsyncClient, url: str, body: Any = None) -> None:
    await _call(client, "POST", url, body)


async def _call(client: httpx.AsyncClient, method: str, url: str, body: Any) -> httpx.Response:
    try:
        answer = await client.request(method, url, json=body, timeout=CALL_LIMIT_S)
    except httpx.HTTPError as error:
        raise SleepError(f"{method} {url}: {type(error).__name__} {error}".rstrip()) from None
    if not answer.is_success:
        raise SleepError(f"{method} {url} answers {answer.status_code}: {answer.text[:500]}")
    return answer
