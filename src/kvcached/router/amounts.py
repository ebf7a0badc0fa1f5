"""Sizes as fields of the settings, as people write them and kvcached checks them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema
from pydantic_core import PydanticCustomError

from kvcached.errors import ConfigError
from kvcached.units import Share, parse_share, parse_size

_SIZE_PATTERN = r"^\s*\d+(\.\d+)?\s*([KMGTkmgt]?)([iI]?[bB])?\s*$"
_SHARE_PATTERN = _SIZE_PATTERN.removesuffix("$") + r"$|^\s*\d+(\.\d+)?\s*%\s*$"


def _share(value: Any) -> Any:
    if isinstance(value, Share):
        return value
    return _parsed(value, parse_share, "a size such as 2GiB, or a percentage such as 25%")


def _size(value: Any) -> Any:
    return _parsed(value, parse_size, "a size such as 64MiB")


def _parsed(value: Any, parse: Callable[[str, str], Any], expected: str) -> Any:
    """Raises what pydantic reports with the field's place; ours would name no field."""
    try:
        if isinstance(value, str | int) and not isinstance(value, bool):
            return parse(str(value), "")
    except ConfigError:
        pass
    raise PydanticCustomError("size", "expected {expected}", {"expected": expected})


def _schema(pattern: str, description: str) -> dict[str, Any]:
    return {
        "anyOf": [{"type": "string", "pattern": pattern}, {"type": "integer", "minimum": 0}],
        "description": description,
    }


ShareField = Annotated[
    Share,
    BeforeValidator(_share),
    PlainSerializer(lambda share: str(share).replace(" ", "")),
    WithJsonSchema(_schema(_SHARE_PATTERN, "a size such as 2GiB, or a percentage such as 25%")),
]
"""Bytes, or a percentage of the device's capacity."""

SizeField = Annotated[
    int, BeforeValidator(_size), WithJsonSchema(_schema(_SIZE_PATTERN, "a size such as 64MiB"))
]
"""Bytes."""
