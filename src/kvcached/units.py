"""Sizes as people write them (``512MiB``, ``20GiB``, ``40%``) and as the core counts them."""

from __future__ import annotations

import re

from kvcached.errors import ConfigError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_FACTORS = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": 1 << 40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", re.IGNORECASE)


def parse_size(text: str, name: str = "size") -> int:
    """Bytes of a size such as ``512MiB``, ``1.5G`` or ``4096``; units are powers of 1024.

    Raises ConfigError naming ``name``, the text and what is allowed.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ConfigError(f"{name}={text!r}: expected a size such as 512MiB, 2GiB or 4096")
    return int(float(match.group(1)) * _FACTORS[match.group(2).upper()])


def format_size(size_bytes: int) -> str:
    """The shortest exact-looking form: ``32 MiB``, ``1.5 GiB``, ``12 B``."""
    value, unit = float(size_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.1f}".rstrip("0").rstrip(".") + f" {unit}"


def ceil_div(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


def round_up(value: int, step: int) -> int:
    """The smallest multiple of ``step`` that is not below ``value``."""
    return ceil_div(value, step) * step
