"""Frozen statistics of a ledger: the only thing that tools read. All sizes are bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvcached.units import format_size

WAIT_BOUNDS_US = tuple(1 << (bucket + 8) for bucket in range(12))
"""The upper bounds of ``AccountSnapshot.wait_buckets``, from 256 us to half a second."""


@dataclass(frozen=True, slots=True)
class MemberSnapshot:
    """One process that maps memory for an instance."""

    pid: int
    """In the PID namespace of that process: only for people to read."""
    alive: bool
    """False once it is dead, until its row is reaped."""
    created: int
    """Bytes that it holds, mapped or kept for reuse."""
    demand: int
    """Bytes that it waits for before the instance has a scheduler; 0 when it does not wait."""
    set_aside: int
    """Bytes that were to be kept for what is allocated beside pages: by an engine that starts, or
    by a program for which a hold was made.
    """
    to_come: int
    """What of them is kept from leases now: foreign memory has not grown by it yet."""
    created_ever: int
    """Bytes created so far by all processes that held this row: it only grows."""
    released_ever: int
    """The same of bytes that are gone."""


@dataclass(frozen=True, slots=True)
class AccountSnapshot:
    """One instance. Numbers of one account fit together; see LedgerSnapshot.consistent."""

    instance: str
    name: str
    owner_pid: int | None
    """The scheduler's process; None while there is none."""
    owner_alive: bool
    ready: bool
    """The owner has said that the engine serves; False while it starts."""
    asleep: bool
    """It has said since that the engine sleeps: its weights are not on the device."""
    guarantee: int
    limit: int | None
    """None: only the device's capacity limits it."""
    weight: float
    pinned: int
    """What the instance cannot run without: an implicit guarantee."""
    leased: int
    """Bytes that the owner may have created; 0 without an owner."""
    created: int
    """Bytes that its members hold."""
    charge: int
    """What counts against the capacity: the larger one of leased and created."""
    in_use: int
    cached: int
    warm: int
    demand: int
    """Bytes wanted that could not be leased, by the owner and by members that wait."""
    granted: int
    """Leases granted so far."""
    refused: int
    """Leases refused so far."""
    reclaims: int
    """How often it gave memory back under pressure, or because an operator asked."""
    reclaimed: int
    """Bytes given back under pressure so far."""
    lock_timeouts: int
    """Leases that failed because a live process held the ledger's lock."""
    asked: int
    """Bytes that operators asked it to give back, and that it has not answered yet."""
    hits: int
    """Blocks that the prefix cache answered (vLLM: of those that no running request held)."""
    misses: int
    """Blocks that were handed out to be computed."""
    evictions: int
    """Cached blocks lost to that, or to a bound of the cache."""
    evictions_by_pressure: int
    """Cached blocks lost because others wanted their memory, or an operator did."""
    waits: int
    """Leases that had to wait for memory, from the demand to the lease."""
    waited_us: int
    """How long they waited, all together, in microseconds."""
    longest_wait_us: int
    wait_buckets: tuple[int, ...]
    """How many waits were shorter than ``WAIT_BOUNDS_US[i]`` and no shorter than the bound before;
    the last number counts all that were longer.
    """
    block_bytes: int
    """One block, all layers, K and V; 0 until the engine has said it."""
    block_tokens: int
    page_bytes: int
    ceiling: int
    """The most bytes that the account can ever hold under today's settings."""
    members: tuple[MemberSnapshot, ...]

    @property
    def pids(self) -> tuple[int, ...]:
        """Every process of the instance that the ledger knows, without repetition."""
        owner = () if self.owner_pid is None else (self.owner_pid,)
        return tuple(dict.fromkeys((*owner, *(member.pid for member in self.members))))

    @property
    def created_ever(self) -> int:
        """Bytes of pages that came, so far. Begins anew when a member leaves."""
        return sum(member.created_ever for member in self.members)

    @property
    def released_ever(self) -> int:
        """Bytes of pages that went, so far. Begins anew when a member leaves."""
        return sum(member.released_ever for member in self.members)

    @property
    def kept(self) -> int:
        """Bytes that its members keep from leases for what will be allocated beside pages."""
        return sum(member.to_come for member in self.members)

    @property
    def above(self) -> int:
        """Bytes that it holds above its limit; what it cannot run without is not above."""
        return 0 if self.limit is None else max(0, self.charge - max(self.limit, self.pinned))

    @property
    def alive(self) -> bool:
        """Whether any process of the instance lives."""
        return self.owner_alive or any(member.alive for member in self.members)


@dataclass(frozen=True, slots=True)
class LedgerSnapshot:
    """One device's ledger at one moment."""

    device: str
    consistent: bool
    """Nothing was leased while this was read. If False, sums over accounts may be off."""
    capacity: int
    headroom: int
    foreign: int
    """Bytes in use on the device that are nobody's pages, as last measured; 0 on the host."""
    set_aside: int
    """Bytes that starting engines and holds will still take beside pages."""
    high_water: int
    """The most that was ever charged to all accounts together."""
    reaps: int
    """Owners and members whose rows were cleared after their death."""
    lock_timeouts: int
    locks_stolen: int
    accounts: tuple[AccountSnapshot, ...]

    @property
    def charge(self) -> int:
        """Bytes charged to all accounts together."""
        return sum(account.charge for account in self.accounts)

    @property
    def free(self) -> int:
        """Bytes that nothing holds and nothing keeps; negative where more is charged than is there
        today, as after the capacity was lowered.
        """
        return self.capacity - self.headroom - self.foreign - self.set_aside - self.charge

    @property
    def missing(self) -> int:
        """Bytes that would have to come back for every account to have what it is sure of."""
        sure = sum(max(each.charge, each.guarantee, each.pinned) for each in self.accounts)
        return max(0, sure - self.charge - self.free)

    def holders(self) -> str:
        """Who has the memory, in words."""
        parts = [
            f"{account.name} {format_size(account.charge)} ({format_size(account.in_use)} in use)"
            for account in self.accounts
            if account.charge
        ]
        if self.foreign:
            parts.append(f"others {format_size(self.foreign)}")
        return ", ".join(parts) or "nobody"

    def account(self, key: str) -> AccountSnapshot | None:
        """The account with this instance or, failing that, this name; None if there is none."""
        by_instance = (account for account in self.accounts if account.instance == key)
        by_name = (account for account in self.accounts if account.name == key)
        return next(by_instance, None) or next(by_name, None)


def ledger_snapshot(raw: Mapping[str, Any]) -> LedgerSnapshot:
    """Freezes what ``vmm_ops.Segment.snapshot`` returns."""
    accounts = tuple(
        AccountSnapshot(
            **{**account, "members": tuple(MemberSnapshot(**m) for m in account["members"])}
        )
        for account in raw["accounts"]
    )
    return LedgerSnapshot(**{**raw, "accounts": accounts})
