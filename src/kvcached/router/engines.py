"""The HTTP client towards the engines: one pool of connections, and what their failures mean.

A request is tried again only where no byte of it was sent: its connection could not be made. A
connection that breaks later may have carried the request, and a request that has ended an engine
must not end the next one: that is an error, and whether to ask again is the client's to say. So
that an engine does not close an idle connection in the moment in which a request is put on it, idle
connections are closed here first, earlier than any engine does (vLLM and SGLang: after 5 s).
"""

from __future__ import annotations

import asyncio
import io
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import aiohttp
from yarl import URL

from kvcached.router.errors import ApiError, broken, silent, unavailable
from kvcached.router.upstream import Upstream, UpstreamDown

IDLE_S = 2.0
_LARGE = 1 << 20
NO_HEADERS: Mapping[str, str] = MappingProxyType({})
_ADDED_BY_THE_CLIENT = ("Accept", "Accept-Encoding", "User-Agent", "Content-Type")

_PROBE_AFTER_S, _PROBE_EVERY_S, _PROBES = 5, 3, 3
"""A host that has vanished closes no connection: the kernel notices after some 15 s of silence."""

BROKEN = (aiohttp.ClientError, OSError, asyncio.TimeoutError)
"""Whatever can happen to a connection that was made."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a request may wait for what. All in seconds."""

    connect_s: float = 5.0
    """For a connection to its engine."""
    silence_s: float = 600.0
    """For the next byte from its engine, the first one too: as long as OpenAI's clients wait."""
    stalled_client_s: float = 60.0
    """For a client to take what it is sent."""
    body_s: float = 60.0
    """For the next part of a request's body."""
    first_retry_s: float = 0.1
    """Before a connection is tried again, and each time twice as long."""
    retries: int = 3


def _probing_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    made = socket.socket(*address[:3])
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_AFTER_S)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_EVERY_S)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
    return made


class Engines:
    """Connections to all engines. Made and closed on the event loop."""

    def __init__(
        self,
        limits: Limits,
        retried: Callable[[str], None],
        headers: Mapping[str, str] = NO_HEADERS,
    ) -> None:
        """``retried`` is told the model of each request that is tried again; ``headers`` go with
        every request: the engines' key.
        """
        self._limits = limits
        self._retried = retried
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0, keepalive_timeout=IDLE_S, socket_factory=_probing_socket
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            headers=headers,
            skip_auto_headers=_ADDED_BY_THE_CLIENT,
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=limits.connect_s, sock_read=limits.silence_s
            ),
        )

    async def ask(
        self,
        upstream: Upstream,
        path: str,
        body: list[bytes],
        headers: Mapping[str, str],
        ready_within_s: float,
    ) -> aiohttp.ClientResponse:
        """The head of the engine's answer. ``body`` is emptied of the one body that it holds once
        that was sent. ``ready_within_s``: how long an engine that refuses the
        connection has to come back. Raises ApiError 502, 503, 504.
        """
        tries = 0
        while True:
            url = URL(upstream.url + path, encoded=True)  # after a wait it may be another host's
            # A large body in one piece would block the loop, and the client warns of it.
            data = body[0] if len(body[0]) < _LARGE else io.BytesIO(body[0])
            try:
                answer = await self._session.post(
                    url, data=data, headers=headers, allow_redirects=False
                )
                body.clear()
                return answer
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
                upstream.suspect(f"no connection: {error}")
                if tries == self._limits.retries:
                    refused = UpstreamDown("its engine does not take connections")
                    raise unavailable(upstream.name, refused) from None
            except BROKEN as error:
                raise self.failed(upstream, error) from None
            await asyncio.sleep(self._limits.first_retry_s * 2**tries)
            await self._ready(upstream, ready_within_s)
            tries += 1
            self._retried(upstream.name)

    async def _ready(self, upstream: Upstream, within_s: float) -> None:
        try:
            await asyncio.wait_for(upstream.ready(), within_s)
        except UpstreamDown as down:
            raise unavailable(upstream.name, down) from None
        except asyncio.TimeoutError:
            late = UpstreamDown(f"its engine did not come back within {within_s:g} s")
            raise unavailable(upstream.name, late) from None

    def failed(self, upstream: Upstream, error: BaseException) -> ApiError:
        """What a connection's failure means, of those in ``BROKEN``."""
        if isinstance(error, asyncio.TimeoutError):
            upstream.suspect(f"silent for {self._limits.silence_s:g} s")
            return silent(upstream.name, self._limits.silence_s)
        what = str(error) or type(error).__name__
        upstream.suspect(f"connection broken: {what}")
        return broken(upstream.name, what)

    async def close(self) -> None:
        """Closes all connections."""
        await self._session.close()
