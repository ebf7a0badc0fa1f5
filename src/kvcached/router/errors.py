"""Answers that are errors, in the form of OpenAI's API, each with the status that is true of it."""

from __future__ import annotations

import json
import math
from typing import Any

from kvcached.router.upstream import UpstreamDown

DEFAULT_RETRY_AFTER_S = 5.0
_QUOTED = 2000
"""So many bytes of an engine's answer that is no OpenAI error are quoted in ours."""


class ApiError(Exception):
    """A request is answered with an error."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        """``kind`` is OpenAI's ``type``; ``retry_after_s`` becomes the header Retry-After."""
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.kind = kind
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """What the answer carries beside its body."""
        found = []
        if self.retry_after_s is not None:
            seconds = max(1, math.ceil(self.retry_after_s))
            found.append((b"retry-after", str(seconds).encode()))
        if self.status == 401:
            found.append((b"www-authenticate", b"Bearer"))
        if self.status == 405:
            found.append((b"allow", b"POST"))
        return found

    def body(self) -> bytes:
        """The answer's body."""
        return json.dumps(form(self.message, self.kind, self.param, self.code)).encode()

    def event(self) -> bytes:
        """The same as an event of a stream that has begun; no ``[DONE]`` may follow."""
        return b"data: " + self.body() + b"\n\n"


def form(message: str, kind: str, param: str | None, code: Any) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def not_found(model: str) -> ApiError:
    """No model has this name."""
    text = f"The model {model!r} does not exist here; GET /v1/models lists those that do."
    return ApiError(404, text, "model_not_found", param="model")


def unavailable(model: str, down: UpstreamDown) -> ApiError:
    """The model's engine failed, or the service ends."""
    again_s = DEFAULT_RETRY_AFTER_S if down.retry_after_s is None else down.retry_after_s
    text = f"The model {model!r} is not available now: {down}"
    return ApiError(503, text, "model_unavailable", kind="server_error", retry_after_s=again_s)


def ending() -> ApiError:
    """The service takes no further requests."""
    text = "The service is shutting down."
    again_s = DEFAULT_RETRY_AFTER_S
    return ApiError(503, text, "shutting_down", kind="server_error", retry_after_s=again_s)


def broken(model: str, what: str) -> ApiError:
    """The engine had the request and broke off; whether to send it again is the client's to say."""
    text = f"The engine of the model {model!r} broke off: {what}. It may have begun the request."
    return ApiError(502, text, "engine_failed", kind="server_error")


def silent(model: str, seconds: float) -> ApiError:
    """The engine has the request and says nothing."""
    text = f"The engine of the model {model!r} said nothing for {seconds:g} s."
    return ApiError(504, text, "engine_timeout", kind="timeout_error")


def openai_form(model: str, path: str, status: int, body: bytes) -> bytes:
    """An engine's error answer in OpenAI's form: as it is if it has it, translated if not."""
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        said = None
    if isinstance(said, dict) and isinstance(said.get("error"), dict):
        return body
    kind = "invalid_request_error" if status < 500 else "server_error"
    text = body[:_QUOTED].decode(errors="replace")
    code: Any = "engine_error"
    if isinstance(said, dict) and isinstance(said.get("message"), str):  # vLLM before 0.10
        text, code = said["message"], said.get("code", code)
    elif status == 404:
        text, code = f"The engine of the model {model!r} does not serve {path}.", "not_served"
    elif isinstance(said, dict) and "detail" in said:
        text = json.dumps(said["detail"])
    return json.dumps(form(text or f"status {status}", kind, None, code)).encode()
