"""One device's shared memory as an operator sees and steers it.

    with kvcached.open_pool() as pool:
        for each in pool.snapshot().accounts:
            print(each.name, each.charge, each.in_use)
        pool.set_limit("chat", "40%")

Settings are rows of the ledger: no engine and no server is asked, and the engines follow them
within a moment. ``kvctl``, ``kvtop`` and the exporter's page use the same calls.
docs/python-api.md has more examples.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from kvcached import devices
from kvcached.closing import Closing
from kvcached.config import Config
from kvcached.errors import ConfigError, InvalidArgumentError
from kvcached.ledger import Ledger
from kvcached.snapshot import AccountSnapshot, LedgerSnapshot
from kvcached.units import MAX_SIZE, format_size, parse_share

EFFECT_S = 1.0
"""How long a setting's effect is looked at, unless another time is named."""
ANSWER_S = 5.0
"""How long ``reclaim`` waits for the engine, unless another time is named."""
_LOOK_S = 0.01

Amount = int | str
"""Bytes, or text such as ``20GiB`` or ``40%`` (of the device's capacity)."""


@dataclass(frozen=True, slots=True)
class Effect:
    """What a setting has done by the time that the call returns."""

    account: AccountSnapshot
    above: int
    """Bytes above the limit. They are in use, and go as requests end."""
    missing: int
    """Bytes of the guarantee that others still use. They come as requests end."""


@dataclass(frozen=True, slots=True)
class Reclaimed:
    """What an instance gave back because it was asked to."""

    account: AccountSnapshot
    wanted: int
    given: int
    """Bytes that no block lies on any more."""
    answered: bool
    """False: the engine has not come to it yet, and will."""


class Pool(Closing):
    """The memory of one device and the instances that share it. Any thread may use it.

    Instances are named by their names, or by their ids where a name is not unique. All methods
    raise LedgerError where the ledger's file was cut or the pool is closed; those that change
    something LedgerBusyError where a live process holds the ledger and does not let go, and
    LedgerError where the pool was opened for reading only.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    @property
    def device(self) -> str:
        """The device's name."""
        return self.ledger.device

    def snapshot(self) -> LedgerSnapshot:
        """Everything that the ledger says now. Costs the engines nothing: no lock is taken."""
        return self.ledger.snapshot()

    def instance(self, name: str) -> AccountSnapshot:
        """One instance now. Raises InvalidArgumentError naming those there are, ConfigError where
        several have this name.
        """
        accounts = self.snapshot().accounts
        found = [a for a in accounts if a.instance == name]
        found = found or [a for a in accounts if a.name == name]
        if len(found) == 1:
            return found[0]
        if found:
            ids = ", ".join(account.instance for account in found)
            raise ConfigError(f"{len(found)} instances are called {name}: expected one of {ids}")
        names = ", ".join(account.name for account in accounts) or "none"
        raise InvalidArgumentError(f"{self.device} has no instance {name}; there are: {names}")

    def set_limit(self, name: str, limit: Amount | None, wait_s: float = EFFECT_S) -> Effect:
        """The most that an instance may hold; None for no limit, 0 to drain it.

        Cached memory above it goes back at once, memory in use as requests end. Returns when that
        is done, or after ``wait_s`` seconds; ``Effect.above`` says what is left.
        Raises InvalidArgumentError where the limit is below the guarantee or makes no sense.
        """
        before, size = self.instance(name), None if limit is None else self._bytes(limit, "limit")
        instance = before.instance
        if size is not None and size < before.guarantee:
            raise InvalidArgumentError(
                f"{before.name}: a limit of {format_size(size)} is below its guarantee of "
                f"{format_size(before.guarantee)}: lower that first"
            )
        self.ledger.set_limit(instance, size)
        _wait(lambda: self.instance(instance).above == 0, wait_s)
        return self._effect(instance)

    def set_guarantee(self, name: str, guarantee: Amount, wait_s: float = EFFECT_S) -> Effect:
        """What an instance is sure of, used or not. Others give back for it what they only cache.

        Returns when it is there, or after ``wait_s`` seconds; ``Effect.missing`` says what is not.
        Raises InvalidArgumentError where all guarantees together are more than can be lent, or this
        one more than the limit.
        """
        before, size = self.instance(name), self._bytes(guarantee, "guarantee")
        instance = before.instance
        if before.limit is not None and size > before.limit:
            raise InvalidArgumentError(
                f"{before.name}: a guarantee of {format_size(size)} is above its limit of "
                f"{format_size(before.limit)}: raise that first"
            )
        self.ledger.set_guarantee(instance, size)
        _wait(lambda: self.snapshot().missing == 0, wait_s)
        return self._effect(instance)

    def set_weight(self, name: str, weight: float) -> Effect:
        """An instance's part of what guarantees leave open, against the others'; 1 to begin with.

        Raises InvalidArgumentError for weights that are not above 0 and at most a million.
        """
        if not math.isfinite(weight):
            raise InvalidArgumentError(f"weight {weight}: expected a number above 0")
        instance = self.instance(name).instance
        self.ledger.set_weight(instance, weight)
        return self._effect(instance)

    def reclaim(
        self, name: str, size: Amount | None = None, timeout_s: float = ANSWER_S
    ) -> Reclaimed:
        """Takes back what an instance does not use: warm pages, then cached blocks, also below its
        guarantee; all of that if no size is given. Raises InvalidArgumentError where nobody
        schedules for the instance.
        """
        before = self.instance(name)
        instance = before.instance
        wanted = before.charge if size is None else self._bytes(size, "reclaim")
        self.ledger.ask_back(instance, wanted)
        answered = _wait(lambda: self.instance(instance).asked == 0, timeout_s)
        given = self.instance(instance).reclaimed - before.reclaimed
        # Given is what no block lies on any more; gone, once the worker has unmapped it.
        _wait(lambda: self.instance(instance).charge <= before.charge - given, EFFECT_S)
        return Reclaimed(self.instance(instance), wanted, given, answered)

    def delete_dead(self, name: str | None = None) -> tuple[AccountSnapshot, ...]:
        """Clears the accounts whose processes are all dead; returns them.

        ``name`` is the one that is meant: InvalidArgumentError if it lives. The rows of all other
        dead go with it, as they would at the next shortage: they hold nothing any more.
        """
        wanted = None if name is None else self.instance(name)
        if wanted is not None and wanted.alive:
            pids = ", ".join(map(str, wanted.pids))
            raise InvalidArgumentError(f"{wanted.name} is alive (process {pids}): stop it first")
        dead = [account for account in self.snapshot().accounts if not account.alive]
        self.ledger.reap()
        left = {account.instance for account in self.snapshot().accounts}
        return tuple(account for account in dead if account.instance not in left)

    def close(self) -> None:
        """Lets go of the ledger. Settings stay."""
        self.ledger.close()

    def _bytes(self, amount: Amount, name: str) -> int:
        size = amount
        if isinstance(size, str):
            size = parse_share(size, name).of(self.ledger.capacity)
        if not 0 <= size <= MAX_SIZE:
            raise InvalidArgumentError(f"{name} of {size} bytes: expected 0 to {MAX_SIZE}")
        return size

    def _effect(self, instance: str) -> Effect:
        now = self.snapshot()
        account = now.account(instance)
        if account is None:
            raise InvalidArgumentError(f"{instance} has left {self.device} meanwhile")
        return Effect(account, account.above, min(now.missing, account.guarantee))


def open_pool(device: str | None = None, *, read_only: bool = False) -> Pool:
    """Opens a device's shared memory; see ``kvcached.open_pool``."""
    config = Config.from_env()
    found = devices.find(config, device)
    return Pool(Ledger.open(config.directory, found, create=False, read_only=read_only))


def _wait(condition: Callable[[], bool], limit_s: float) -> bool:
    end_s = time.monotonic() + limit_s
    while not (done := condition()) and time.monotonic() < end_s:
        time.sleep(_LOOK_S)
    return done
