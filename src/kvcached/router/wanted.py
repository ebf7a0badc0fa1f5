"""What a request asks for: its model, and about how long its prompt is.

Only that is read from a body; everything else is passed on as it came, also what is wrong with it:
the engine knows better what it takes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import msgspec

from kvcached.router.errors import ApiError

BYTES_PER_TOKEN = 4
"""About so many bytes of text are a token."""
TOKENS_PER_IMAGE = 600
_DATA_URL = re.compile(rb'"data:[^"]*"')
_NONE = msgspec.Raw(b"")


class _Head(msgspec.Struct):
    """The fields that matter here. Others are skipped, and checked to be JSON."""

    model: str
    stream: Any = None
    prompt: msgspec.Raw = _NONE
    messages: msgspec.Raw = _NONE
    tools: msgspec.Raw = _NONE
    input: msgspec.Raw = _NONE


_HEADS = msgspec.json.Decoder(_Head)
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a body says."""

    model: str
    """The name that the client uses: a model's or an alias."""
    tokens: int
    """An estimate of the prompt's length; exact where token ids were sent."""
    streams: bool
    """Whether the answer is to come token by token."""


def read(body: bytes) -> Wanted:
    """Raises ApiError 400 for what is no JSON object with a model."""
    try:
        head = _HEADS.decode(body)
    except msgspec.ValidationError as error:
        raise ApiError(400, f"The body is wrong: {error}", "invalid_body", param="model") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"The body is not JSON: {error}", "invalid_json") from None
    fields = (head.prompt, head.messages, head.tools, head.input)
    tokens = sum(_tokens(bytes(field)) for field in fields)
    return Wanted(head.model, tokens, head.stream is True)


def _tokens(value: bytes) -> int:
    """Of a JSON value: a text, or a list of texts, of messages, of token ids."""
    images = 0
    if b'"data:' in value:
        value, images = _DATA_URL.subn(b"", value)
    if value[:1] == b"[" and b'"' not in value:  # numbers
        return value.count(b",") + 1 if len(value) > 2 else 0
    return len(value) // BYTES_PER_TOKEN + images * TOKENS_PER_IMAGE


def renamed(body: bytes, model: str) -> bytes:
    """The same body with another model; all other values keep their very bytes."""
    fields = _FIELDS.decode(body)
    fields["model"] = msgspec.Raw(msgspec.json.encode(model))
    return msgspec.json.encode(fields)
