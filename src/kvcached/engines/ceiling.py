"""What a request could have at most, for front ends: they say no at once to what never fits."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvcached.ledger import Ledger
from kvcached.snapshot import AccountSnapshot
from kvcached.units import ceil_div

FRESH_S = 1.0
"""How long what was read of an account serves for a yes."""


@dataclass(frozen=True, slots=True)
class Excess:
    """The blocks that a prompt needs, the most that its instance can get, and what was read."""

    blocks: int
    most: int
    account: AccountSnapshot


class Ceiling:
    """The most blocks that an instance could ever have, on the device that can give it least.

    Every request asks, and reading a ledger costs as much as all else that a front end does for
    one. So what was read serves for a moment, but only for a yes: what changes meanwhile, the
    engine's scheduler finds. One thread.
    """

    def __init__(
        self,
        ledgers: Sequence[Ledger],
        instance: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ledgers, self._instance, self._clock = ledgers, instance, clock
        self._account: AccountSnapshot | None = None
        self._most_tokens = -1  # of a prompt that fits
        self._stale_s = float("-inf")

    def exceeded(self, tokens: int) -> Excess | None:
        """By a prompt of which so many tokens must be kept; None where it can fit, and where the
        instance's account or its blocks are not known.
        """
        if tokens <= self._most_tokens and self._clock() < self._stale_s:
            return None
        self._read()
        if (account := self._account) is None or tokens <= self._most_tokens:
            return None
        most = (self._most_tokens + 1) // account.block_tokens
        return Excess(ceil_div(tokens + 1, account.block_tokens), most, account)

    def _read(self) -> None:
        found = [ledger.snapshot().account(self._instance) for ledger in self._ledgers]
        described = [account for account in found if account is not None and account.block_bytes]
        self._account = account = min(described, key=lambda each: each.ceiling, default=None)
        self._most_tokens = -1
        if account is not None:
            in_page = account.page_bytes // account.block_bytes
            # Block 0 is the engine's own.
            most = max(0, account.ceiling // account.page_bytes * in_page - 1)
            self._most_tokens = most * account.block_tokens - 1  # one more is generated
            self._stale_s = self._clock() + FRESH_S
