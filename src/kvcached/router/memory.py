"""Which models' memory is short, as the ledgers say: the only thing that scheduling reads of them.

A device is short while anybody's demand could not be leased, and a little longer: what the router
holds back lessens the demand, and a device that is short again at once was short all the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from kvcached.observe import Observer
from kvcached.snapshot import LedgerSnapshot

EVERY_S = 0.1
"""The time between two looks: tens of microseconds each, without a lock."""
HOLD_S = 1.0
"""A device counts as short for so long after its last demand."""


class Pressure:
    """Follows the ledgers. One thread: the event loop's."""

    def __init__(
        self,
        read: Callable[[], Iterable[LedgerSnapshot]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read = read
        self._clock = clock
        self._short_until: dict[str, float] = {}
        self.short: Mapping[str, str] = MappingProxyType({})
        """By model (an account's name): a device of its that is short of memory."""

    @classmethod
    def of(cls, observer: Observer) -> Pressure:
        """Follows what an observer sees."""
        return cls(observer.read)

    def look(self) -> bool:
        """Reads the ledgers; whether ``short`` has changed."""
        now_s = self._clock()
        short: dict[str, str] = {}
        for ledger in self._read():
            if any(account.demand > 0 and account.alive for account in ledger.accounts):
                self._short_until[ledger.device] = now_s + HOLD_S
            if now_s < self._short_until.get(ledger.device, now_s):
                for account in ledger.accounts:
                    short.setdefault(account.name, ledger.device)
        if short == self.short:
            return False
        self.short = MappingProxyType(short)
        return True
