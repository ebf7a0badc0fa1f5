"""The words and bars of kvtop, without colours: cells of a fixed width."""

from __future__ import annotations

from collections.abc import Sequence

from kvcached.cli.edge import one_line
from kvcached.cli.top.rates import DeviceView, Line
from kvcached.units import format_size

IN_USE, CACHED, WARM, FREE, BEYOND, LIMIT, GUARANTEE = "█▓▒· ┃╎"
SPARKS = " ▁▂▃▄▅▆▇█"

COLUMNS = (
    ("instance", 14),
    ("memory", 17),
    ("held", 8),
    ("limit", 8),
    ("demand", 8),
    ("map/s", 7),
    ("unm/s", 6),
    ("rec/s", 6),
    ("ref/s", 6),
)
"""Headings and widths: 80 characters together. The bar takes what a wider screen has more."""
WIDTH = sum(width for _, width in COLUMNS)


def short_size(size: int) -> str:
    """At most seven characters, such as ``1.5G`` or ``1023.9M``."""
    return format_size(size).replace(" ", "").replace("iB", "").removesuffix("B")


def short_rate(rate: float) -> str:
    """Nothing for zero, so that what happens stands out."""
    if rate <= 0:
        return ""
    if rate < 9.95:
        return f"{rate:.1f}"
    return f"{rate:.0f}" if rate < 1e4 else f"{rate / 1e3:.0f}k"


def bar(line: Line, width: int) -> str:
    """In use, cached and warm memory, limit and guarantee, of the device's capacity."""
    account, capacity = line.account, max(1, line.capacity)

    def at(size: int) -> int:
        return max(0, min(width, round(width * size / capacity)))

    used = at(account.in_use)
    cached = at(account.in_use + account.cached)
    held = max(cached, at(max(account.charge, account.in_use + account.cached + account.warm)))
    limit = width if account.limit is None else at(account.limit)
    cells = list(IN_USE * used + CACHED * (cached - used) + WARM * (held - cached))
    cells += [FREE if place < limit else BEYOND for place in range(len(cells), width)]
    if account.guarantee > 0:
        cells[min(at(account.guarantee), width - 1)] = GUARANTEE
    if account.limit is not None:
        cells[min(limit, width - 1)] = LIMIT
    return "".join(cells)


def name_of(line: Line) -> str:
    """With a sign for what is not at work."""
    account = line.account
    sign = "z" if account.asleep else "" if account.ready else "~"
    return (sign if account.alive else "✝") + one_line(account.name)


def cells(line: Line, bar_width: int) -> tuple[str, ...]:
    """One instance, a cell for each column, aligned."""
    account, rates = line.account, line.rates
    limit = "-" if account.limit is None else short_size(account.limit)
    demand = short_size(account.demand) if account.demand else ""
    texts = (
        name_of(line),
        bar(line, bar_width - 1),
        short_size(account.charge),
        limit,
        demand,
        short_rate(rates.mapped),
        short_rate(rates.unmapped),
        short_rate(rates.reclaimed),
        short_rate(rates.refused),
    )
    return aligned(texts, bar_width)


def headings(bar_width: int) -> tuple[str, ...]:
    """The columns' names, aligned as their cells."""
    return aligned([name for name, _ in COLUMNS], bar_width)


def aligned(texts: Sequence[str], bar_width: int) -> tuple[str, ...]:
    """Names and bars to the left, numbers to the right; too long a name is cut."""
    found = []
    for index, (text, (_, width)) in enumerate(zip(texts, COLUMNS, strict=True)):
        width = bar_width if index == 1 else width
        if index > 1:
            found.append(text.rjust(width))
        else:
            found.append((text if len(text) < width else text[: width - 2] + "…").ljust(width))
    return tuple(found)


def title(view: DeviceView) -> str:
    """One line about a device."""
    ledger = view.ledger
    parts = [f"{ledger.device}  {format_size(ledger.capacity)}", f"free {format_size(ledger.free)}"]
    if ledger.foreign:
        parts.append(f"other programs {format_size(ledger.foreign)}")
    if ledger.set_aside:
        parts.append(f"set aside {format_size(ledger.set_aside)}")
    parts.append(f"{len(ledger.accounts)} instances")
    return ", ".join(parts)


def spark(view: DeviceView, width: int) -> str:
    """What was charged at the last looks, of the capacity; the newest to the right."""
    steps = len(SPARKS) - 1
    capacity = max(1, view.ledger.capacity)
    shown = view.charges[-width:]
    places = (min(steps, max(0, -(-charge * steps // capacity))) for charge in shown)
    return "".join(SPARKS[place] for place in places).rjust(width)
