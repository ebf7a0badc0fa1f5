"""What a screen shows of the ledgers: the last look, and how fast things change."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from kvcached.snapshot import AccountSnapshot, LedgerSnapshot

KEPT = 240
"""Looks that the sparkline remembers."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Changes a second, since the look before."""

    mapped: float = 0.0
    """Pages that came."""
    unmapped: float = 0.0
    """Pages that went."""
    reclaimed: float = 0.0
    """Pages given back because others or an operator wanted them."""
    refused: float = 0.0
    """Leases refused."""


@dataclass(frozen=True, slots=True)
class Line:
    """One instance."""

    device: str
    capacity: int
    account: AccountSnapshot
    rates: Rates


@dataclass(frozen=True, slots=True)
class DeviceView:
    """One device, its instances, and what was charged at the last looks."""

    ledger: LedgerSnapshot
    lines: tuple[Line, ...]
    charges: tuple[int, ...]


@dataclass(slots=True)
class Looks:
    """Turns one look after the other into what is shown."""

    _last: dict[str, tuple[float, LedgerSnapshot]] = field(default_factory=dict)
    _charges: dict[str, deque[int]] = field(default_factory=dict)

    def take(self, ledgers: Iterable[LedgerSnapshot], now_s: float) -> list[DeviceView]:
        """``now_s`` is a monotonic time."""
        views = []
        for ledger in ledgers:
            before = self._last.get(ledger.device)
            charges = self._charges.setdefault(ledger.device, deque(maxlen=KEPT))
            charges.append(ledger.charge)
            lines = tuple(
                Line(ledger.device, ledger.capacity, account, _rates(before, now_s, account))
                for account in ledger.accounts
            )
            views.append(DeviceView(ledger, lines, tuple(charges)))
            self._last[ledger.device] = (now_s, ledger)
        return views


def _rates(
    before: tuple[float, LedgerSnapshot] | None, now_s: float, account: AccountSnapshot
) -> Rates:
    if before is None or now_s <= before[0]:
        return Rates()
    old = next((a for a in before[1].accounts if a.instance == account.instance), None)
    if old is None:
        return Rates()
    passed_s, page = now_s - before[0], account.page_bytes

    def rate(name: str, unit: int) -> float:
        # Counters begin anew with a new owner or member: then nothing is known for one look.
        grown = max(0, getattr(account, name) - getattr(old, name))
        return grown / unit / passed_s if unit else 0.0  # the engine has not said its page's size

    return Rates(
        rate("created_ever", page),
        rate("released_ever", page),
        rate("reclaimed", page),
        rate("refused", 1),
    )


ORDERS = ("charge", "demand", "cached", "mapped", "name")


def ordered(lines: Iterable[Line], order: str, wanted: str = "") -> list[Line]:
    """The instances whose names hold ``wanted``, most first; by name from a to z."""
    found = [line for line in lines if wanted.lower() in line.account.name.lower()]
    if order == "name":
        return sorted(found, key=lambda line: line.account.name)

    def size(line: Line) -> float:
        if order == "mapped":
            return line.rates.mapped + line.rates.unmapped
        return float(getattr(line.account, order))

    return sorted(found, key=lambda line: (-size(line), line.account.name))
