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
    """One budget, in pages of each engine's size, shared by ``kvcached.policy``.

    With ``caching``, what requests leave stays as prefix cache until somebody needs it. Nobody is
    answered from it here, so it is nobody's working set (``kvcached.answers``). Without, it goes
    back at once.
    """

    def __init__(self, lendable: int, pages: Sequence[int], caching: bool = False) -> None:
        self._lendable = lendable
        self._pages = list(pages)
        self._used = list(pages)  # the page of block 0 is pinned
        self._cached = [0] * len(pages)
        self._demand = [0] * len(pages)
        self._targets: list[Target | None] = [None] * len(pages)
        self._caching = caching
        self.refused = 0
        self.high_water = sum(self._used)

    def ensure(self, index: int, size_bytes: int) -> bool:
        more = round_up(max(size_bytes, 1), self._pages[index]) - self._used[index]
        if more <= 0:
            return True
        missing = more - self._cached[index]
        if self._others_wait(index):
            lease = max(0, missing)
            there = lease == 0 or (lease <= self.free and self._may(index, lease))
        else:  # memory that lies idle goes before the own cache
            lease = max(missing, min(more, self.free // self._pages[index] * self._pages[index]))
            there = lease <= self.free
        if not there:
            lease = missing
            self._change(index, demand=missing)
            self._relieve(index)
            there = lease <= self.free and self._may(index, lease)
        if not there:
            self.refused += 1
            return False
        self._change(
            index,
            used=self._used[index] + more,
            cached=self._cached[index] - (more - lease),
            demand=0,
        )
        self.high_water = max(self.high_water, self._lendable - self.free)
        return True

    def settle(self, index: int, size_bytes: int, waits: bool) -> None:
        used = round_up(max(size_bytes, 1), self._pages[index])
        left = self._used[index] - used
        cached = self._cached[index] + left if self._caching or left < 0 else self._cached[index]
        demand = self._demand[index] if waits else 0
        self._change(index, used=used, cached=max(0, cached), demand=demand)
        if self._cached[index] and self._others_wait(index):
            self._give(index)

    def closed(self, index: int) -> bool:
        return self._others_wait(index) and self._target(index).owed > 0

    def most(self, index: int) -> int:
        return self._lendable - sum(self._pages) + self._pages[index]

    @property
    def free(self) -> int:
        """What nobody holds."""
        return self._lendable - sum(self._used) - sum(self._cached)

    def _others_wait(self, index: int) -> bool:
        return any(demand and i != index for i, demand in enumerate(self._demand))

    def _relieve(self, index: int) -> None:
        """The others give back what fair shares ask for."""
        for other, cached in enumerate(self._cached):
            if other != index and cached:
                self._give(other)

    def _give(self, index: int) -> None:
        give = round_up(self._target(index).give, self._pages[index])
        self._change(index, cached=self._cached[index] - min(give, self._cached[index]))

    def _may(self, index: int, more: int) -> bool:
        if not self._others_wait(index):
            return True
        before = self._demand[index]
        self._change(index, demand=more)
        granted = self._target(index).grant
        self._change(index, demand=before)
        return more <= granted

    def _change(
        self,
        index: int,
        *,
        used: int | None = None,
        cached: int | None = None,
        demand: int | None = None,
    ) -> None:
        for values, value in ((self._used, used), (self._cached, cached), (self._demand, demand)):
            if value is not None and value != values[index]:
                values[index] = value
                self._targets = [None] * len(self._pages)

    def _target(self, index: int) -> Target:
        known = self._targets[index]
        if known is None:
            standings = [self._standing(i) for i in range(len(self._pages))]
            known = self._targets[index] = target(self._lendable, standings, index)
        return known

    def _standing(self, index: int) -> Standing:
        page, used, cached = self._pages[index], self._used[index], self._cached[index]
        return Standing(
            guarantee=page,
            charge=used + cached,
            in_use=used,
            cached=cached,
            demand=self._demand[index],
            page=page,
        )
