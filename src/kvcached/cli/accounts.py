"""What the tools show of a ledger: plain figures, read through ``kvcached.ledger``."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcached.errors import LedgerError


@dataclass(frozen=True, slots=True)
class AccountFigures:
    """One engine's account. All but the counts in bytes."""

    name: str
    charge: int
    created: int
    in_use: int
    cached: int
    warm: int
    demand: int
    pinned: int
    page_bytes: int
    leases_refused: int
    reclaimed: int


@dataclass(frozen=True, slots=True)
class LedgerFigures:
    """The ledger of one device at one moment."""

    capacity: int
    high_water: int
    accounts: tuple[AccountFigures, ...]

    def account(self, name: str) -> AccountFigures | None:
        return next((account for account in self.accounts if account.name == name), None)


class LedgerReader:
    """Reads a device's ledger again and again; it opens it once and never creates it."""

    def __init__(self, directory: Path, device: str) -> None:
        self._directory, self._device = directory, device
        self._ledger: Any = None

    def read(self) -> LedgerFigures:
        """The figures now; takes no lock. Raises LedgerError where there is no good ledger."""
        if self._ledger is None:
            module = importlib.import_module("kvcached.ledger")
            self._ledger = module.Ledger.open(
                self._directory, self._device, create=False, read_only=True
            )
        return _figures(self._ledger.snapshot())

    def read_or_none(self) -> LedgerFigures | None:
        """Like ``read``, but None until there is a ledger."""
        try:
            return self.read()
        except LedgerError:
            return None


def _figures(snapshot: Any) -> LedgerFigures:
    return LedgerFigures(
        capacity=snapshot.capacity,
        high_water=snapshot.high_water,
        accounts=tuple(
            AccountFigures(
                name=account.name,
                charge=account.charge,
                created=account.created,
                in_use=account.in_use,
                cached=account.cached,
                warm=account.warm,
                demand=account.demand,
                pinned=account.pinned,
                page_bytes=account.page_bytes,
                leases_refused=account.refused,
                reclaimed=account.reclaimed,
            )
            for account in snapshot.accounts
        ),
    )
