"""Sizes as people write them (``512MiB``, ``20GiB``, ``40%``) and as the core counts them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kvcached.errors import ConfigError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

MAX_SIZE = 1 << 62
"""What no device has: larger sizes are mistakes, and would not fit the ledger's numbers."""

_FACTORS = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": 1 << 40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", re.IGNORECASE)


def parse_size(text: str, name: str = "size") -> int:
    """Bytes of a size such as ``512MiB``, ``1.5G`` or ``4096``; units are powers of 1024.

    Raises ConfigError naming ``name``, the text and what is allowed.
    """
    match = _SIZE.fullmatch(text)
    # Parts of a byte: the unit was forgotten. Half of something must not become 0, a real limit.
    if match is None or ("." in match.group(1) and not match.group(2)):
        raise ConfigError(f"{name}={text!r}: expected a size such as 512MiB, 2GiB or 4096")
    size = float(match.group(1)) * _FACTORS[match.group(2).upper()]
    if size > MAX_SIZE:
        raise ConfigError(f"{name}={text!r}: expected at most {format_size(MAX_SIZE)}")
    return int(size)


@dataclass(frozen=True, slots=True)
class Share:
    """An amount of memory: bytes, or a percentage of a capacity that is known later."""

    size_bytes: int = 0
    percent: float | None = None

    def of(self, capacity_bytes: int) -> int:
        """The amount in bytes where the capacity is ``capacity_bytes``."""
        if self.percent is None:
            return self.size_bytes
        return int(capacity_bytes * self.percent / 100)

    def __str__(self) -> str:
        return format_size(self.size_bytes) if self.percent is None else f"{self.percent:g}%"


def parse_share(text: str, name: str = "size") -> Share:
    """A size as ``parse_size`` takes it, or a percentage from 0% to 100%. Raises as it does."""
    number = text.strip().removesuffix("%")
    if number == text.strip():
        return Share(size_bytes=parse_size(text, name))
    try:
        percent = float(number)
    except ValueError:
        percent = -1.0
    if not 0 <= percent <= 100:
        allowed = "a percentage from 0% to 100%"
        raise ConfigError(f"{name}={text!r} is not allowed: expected {allowed}")
    return Share(percent=percent)


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
