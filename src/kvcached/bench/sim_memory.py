"""Who gets the KV memory of a simulated GPU: fixed parts, or the policy of a real ledger."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvcached.policy import Standing, Target, target
from kvcached.units import round_up


class Memory(Protocol):
    """Hands memory to the engines of one GPU, by their index. Sizes in bytes."""

    def ensure(self, index: int, size_bytes: int) -> bool:
        """Lets an engine use so much in all, or refuses and changes nothing it has."""

    def settle(self, index: int, size_bytes: int, waits: bool) -> None:
        """An engine uses so much in all now; whether it still waits for what was refused."""

    def closed(self, index: int) -> bool:
        """Whether an engine should start no further request."""

    def most(self, index: int) -> int:
        """What an engine could ever get."""


class Static:
    """A part for each engine."""

    def __init__(self, parts: Sequence[int]) -> None:
        self._parts = list(parts)

    def ensure(self, index: int, size_bytes: int) -> bool:
        return size_bytes <= self._parts[index]

    def settle(self, index: int, size_bytes: int, waits: bool) -> None:
        pass

    def closed(self, index: int) -> bool:
        return False

    def most(self, index: int) -> int:
        return self._parts[index]


class Elastic:
    """One budget, in pages of each engine's size, shared by ``kvcached.policy``. Memory that is not
    in use goes back at once: nothing is cached here.
    """

    def __init__(self, lendable: int, pages: Sequence[int]) -> None:
        self._lendable = lendable
        self._pages = list(pages)
        self._charge = list(pages)  # the page of block 0 is pinned
        self._demand = [0] * len(pages)
        self._targets: list[Target | None] = [None] * len(pages)
        self.refused = 0
        self.high_water = sum(self._charge)

    def ensure(self, index: int, size_bytes: int) -> bool:
        size = round_up(max(size_bytes, 1), self._pages[index])
        more = size - self._charge[index]
        if more <= 0:
            return True
        free = self._lendable - sum(self._charge)
        if more <= free and self._may(index, more):
            self._change(index, size, 0)
            self.high_water = max(self.high_water, sum(self._charge))
            return True
        self.refused += 1
        self._change(index, self._charge[index], more)
        return False

    def settle(self, index: int, size_bytes: int, waits: bool) -> None:
        demand = self._demand[index] if waits else 0
        self._change(index, round_up(max(size_bytes, 1), self._pages[index]), demand)

    def closed(self, index: int) -> bool:
        return self._others_wait(index) and self._target(index).owed > 0

    def most(self, index: int) -> int:
        return self._lendable - sum(self._pages) + self._pages[index]

    def _others_wait(self, index: int) -> bool:
        return any(demand and i != index for i, demand in enumerate(self._demand))

    def _may(self, index: int, more: int) -> bool:
        if not self._others_wait(index):
            return True
        before = self._demand[index]
        self._change(index, self._charge[index], more)
        granted = self._target(index).grant
        self._change(index, self._charge[index], before)
        return more <= granted

    def _change(self, index: int, charge: int, demand: int) -> None:
        if (charge, demand) != (self._charge[index], self._demand[index]):
            self._charge[index], self._demand[index] = charge, demand
            self._targets = [None] * len(self._pages)

    def _target(self, index: int) -> Target:
        known = self._targets[index]
        if known is None:
            standings = [
                Standing(guarantee=page, charge=charge, in_use=charge, demand=demand, page=page)
                for page, charge, demand in zip(
                    self._pages, self._charge, self._demand, strict=True
                )
            ]
            known = self._targets[index] = target(self._lendable, standings, index)
        return known
