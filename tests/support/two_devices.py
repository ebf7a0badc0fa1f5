"""What is looked at of one engine whose two ranks lie on two devices."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from kvcached.ledger import Ledger
from kvcached.snapshot import AccountSnapshot


@dataclass(frozen=True)
class TwoDevices:
    """The ledgers of an engine's devices; ``name`` is its account's on both."""

    name: str
    ledgers: tuple[Ledger, Ledger]

    def accounts(self) -> list[AccountSnapshot]:
        found = [ledger.snapshot().account(self.name) for ledger in self.ledgers]
        assert None not in found
        return found  # type: ignore[return-value]

    def check_both_hold(self, smaller: int, page: int) -> None:
        """That the first device, which is the smaller one, decided what both hold at most."""
        highest = [ledger.snapshot().high_water for ledger in self.ledgers]
        assert smaller - page < highest[0] <= smaller
        pages_on_their_way_out = 2 * page
        assert highest[0] <= highest[1] <= smaller + pages_on_their_way_out

    def check_reclaim(self, number: int) -> None:
        """That pressure on one device takes cached pages from both."""
        before = self.accounts()
        page = before[0].page_bytes
        assert before[0].charge == before[1].charge and before[0].cached > 4 * page
        ledger = self.ledgers[number]
        free = ledger.capacity - ledger.snapshot().charge
        with ledger.join("rival", "rival", page) as rival:
            rival.set_demand(free // page * page + 2 * page)
            _within(10, lambda: self.accounts()[number].charge < before[number].charge)
            _within(10, lambda: len({account.charge for account in self.accounts()}) == 1)
        assert all(account.reclaimed >= 2 * page for account in self.accounts())

    def check_empty(self, limit_s: float) -> None:
        """That nothing is left of the engine on either device."""
        for ledger in self.ledgers:
            _within(limit_s, lambda ledger=ledger: empty(ledger))  # type: ignore[misc]


def empty(ledger: Ledger) -> bool:
    """Whether nobody has anything on a device, now that the dead are cleared away."""
    ledger.reap()
    return ledger.snapshot().accounts == () and ledger.snapshot().charge == 0


def check_came_back(loaded: dict[str, int], reset: dict[str, int]) -> None:
    """That the kernel and the ledger agree, and that a flushed engine holds next to nothing."""
    assert loaded["physical"] == loaded["created"] == loaded["charge"]
    assert reset["physical"] == reset["created"] == reset["charge"]
    assert reset["charge"] <= reset["pinned"] + reset["page"], "pinned and at most one warm page"


def _within(limit_s: float, condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s, f"not within {limit_s} s"
        time.sleep(0.005)
