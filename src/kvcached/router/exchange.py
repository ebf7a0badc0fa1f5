"""One request and its answer, as the server gives them (ASGI): its body, its client, its reply."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvcached.closing import Closing
from kvcached.router.engines import Limits
from kvcached.router.errors import ApiError

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]

_JSON = (b"content-type", b"application/json")
_EVENT_END = b"\n\n"
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


@dataclass(slots=True)
class Room:
    """Bytes for bodies that are held at once, of all requests together."""

    most: int
    held: int = 0


class Exchange(Closing):
    """Owned by the task that answers the request: a context within that task.

    While ``watched``, a client that goes away cancels the task, as does one that neither sends nor
    takes anything for too long; ``gone`` says so.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, limits: Limits) -> None:
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.request_id = _request_id(self.headers.get(b"x-request-id"))
        self.status = 0
        """Of the answer, once it has begun."""
        self.gone = ""
        """Why the task was cancelled: ``client``, ``stalled`` or ``slow body``; empty if not."""
        self._receive = receive
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._blocked: tuple[str, float, float] | None = None  # why if too long, since, most
        self._patience = (limits.body_s, limits.stalled_client_s)
        self._every_s = min(self._patience) / 4
        self._timer = self._loop.call_later(self._every_s, self._look)
        self._watch: asyncio.Task[None] | None = None
        self._over = False
        self._events = False  # the answer is a stream of events
        self._last = b""
        self._room: Room | None = None
        self._held = 0

    def close(self) -> None:
        """Nothing is timed or watched any more; the body's room is free."""
        self._over = True
        self.drop_body()
        self._timer.cancel()
        if self._watch is not None:
            self._watch.cancel()

    # -- From the client ------------------------------------------------------------------------

    async def body(self, most: int, room: Room) -> bytes:
        """The whole body; it takes ``room`` until ``drop_body`` or the end of the exchange.

        Raises ApiError 413 as soon as it is longer than ``most`` bytes, 503 where there is no room.
        """
        promised = self.headers.get(b"content-length", b"")
        if promised.isdigit() and int(promised[:20]) > most:
            raise _too_large(most)
        found, more = bytearray(), True
        while more:
            self._blocked = ("slow body", self._loop.time(), self._patience[0])
            message = await self._receive()
            self._blocked = None
            if message["type"] == "http.disconnect":
                self._stop("client")
                await asyncio.sleep(0)  # where the task is cancelled
            part: bytes = message.get("body", b"")
            more = message.get("more_body", False)
            if len(found) + len(part) > most:
                raise _too_large(most)
            self._take_room(room, len(part))
            if not more and not found:
                return part
            found += part
        return bytes(found)

    def _take_room(self, room: Room, size: int) -> None:
        if room.held + size > room.most:
            text = "Too many large requests are being received; try again."
            raise ApiError(503, text, "too_busy", kind="server_error", retry_after_s=1.0)
        room.held += size
        self._room, self._held = room, self._held + size

    def drop_body(self) -> None:
        """The body is not needed any more."""
        if self._room is not None:
            self._room.held -= self._held
            self._room, self._held = None, 0

    def watched(self) -> None:
        """From now on, with the body read, a client that goes away cancels the task."""
        self._watch = self._loop.create_task(self._wait_for_its_end())

    async def _wait_for_its_end(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._stop("client")

    def _look(self) -> None:
        if self._blocked is not None:
            why, since_s, most_s = self._blocked
            if self._loop.time() - since_s > most_s:
                self._stop(why)
                return
        self._timer = self._loop.call_later(self._every_s, self._look)

    def _stop(self, why: str) -> None:
        # The server says so too when an answer is complete.
        if not self._over and not self.gone and self._task is not None:
            self.gone = why
            self._task.cancel()

    # -- To the client --------------------------------------------------------------------------

    async def begin(self, status: int, headers: Headers) -> None:
        """Sends the head of an answer."""
        self.status = status
        self._events = any(h == b"content-type" and _is_events(kind) for h, kind in headers)
        ours = (b"x-request-id", self.request_id.encode())
        await self._send({
            "type": "http.response.start", "status": status, "headers": [*headers, ours]
        })  # fmt: skip

    async def send(self, part: bytes) -> None:
        """Sends a part of it, and waits while the client takes none."""
        self._blocked = ("stalled", self._loop.time(), self._patience[1])
        await self._send({"type": "http.response.body", "body": part, "more_body": True})
        self._blocked = None
        self._last = part

    async def end(self, part: bytes = b"") -> None:
        """Sends the last part."""
        self._over = True
        await self._send({"type": "http.response.body", "body": part, "more_body": False})

    async def whole(self, status: int, headers: Headers, body: bytes) -> None:
        """Sends an answer in one piece."""
        await self.begin(status, [*headers, (b"content-length", str(len(body)).encode())])
        await self.end(body)

    async def error(self, error: ApiError) -> None:
        """Sends an error as the answer."""
        await self.whole(error.status, [_JSON, *error.headers], error.body())

    async def break_off(self, error: ApiError) -> None:
        """Says that an answer ends before its end, as far as that can be said.

        One that has not begun is an error. A stream of events gets one more with the error, also
        after half an event, and no ``[DONE]``. Of any other the server cuts the connection, since
        it is not complete: what was sent cannot be taken for the whole.
        """
        if not self.status:
            await self.error(error)
        elif self._events:
            whole_event = not self._last or self._last.endswith(_EVENT_END)
            await self.end((b"" if whole_event else _EVENT_END) + error.event())


def _is_events(kind: bytes) -> bool:
    return kind.startswith(b"text/event-stream")


def _request_id(given: bytes | None) -> str:
    """The client's, if it can stand in a log and in a header; a new one if not."""
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given.decode()
    return uuid.uuid4().hex


def _too_large(most: int) -> ApiError:
    text = f"The request is larger than {most} bytes, the most that is taken here."
    return ApiError(413, text, "request_too_large")
