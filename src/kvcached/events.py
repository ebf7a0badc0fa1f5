"""What happened between two looks at a ledger: for logs, for programs and for marks in pictures.

Nobody writes events anywhere: they are what differs between two snapshots, so watching costs the
engines nothing, and whoever looks less often sees several of a kind as one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from kvcached.snapshot import AccountSnapshot, LedgerSnapshot
from kvcached.units import format_size

KINDS: Mapping[str, str] = MappingProxyType(
    {
        "ledger": "a ledger was seen for the first time",
        "joined": "an instance has an account",
        "ready": "its engine serves",
        "asleep": "its engine sleeps: the weights have left the device",
        "awake": "it serves again",
        "left": "an instance ended as it should, and its account is gone",
        "died": "all processes of an instance are dead; its account is still there",
        "reaped": "the account of a dead instance was cleared",
        "limit": "an operator, or the engine's start, changed a limit",
        "guarantee": "the same for a guarantee",
        "weight": "the same for a weight",
        "capacity": "the same for the ledger's capacity or headroom",
        "refused": "leases were refused: the instance wants memory that is not there",
        "waited": "leases were granted that had to wait",
        "reclaim": "an instance gave back memory that others wanted, or an operator",
        "set aside": "memory was set aside for an engine's start or by a hold, or that has ended",
    }
)
"""Every kind of event, and what it means."""

Figure = int | float | str | None


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to an instance, or to a device where ``instance`` is empty."""

    kind: str
    device: str
    instance: str
    name: str
    figures: Mapping[str, Figure]
    """What there is to say in numbers: bytes, counts, microseconds (``*_us``)."""

    def __str__(self) -> str:
        subject = f"{self.device}: {self.name}" if self.name else self.device
        words = [_words(key, value) for key, value in self.figures.items()]
        return f"{subject}: {self.kind}" + (f" ({', '.join(words)})" if words else "")


def _words(key: str, value: Figure) -> str:
    name = key.replace("_", " ")
    if value is None:
        return f"{name} none"
    if key.endswith("_us") and isinstance(value, int):
        return f"{name.removesuffix(' us')} {value / 1000:.1f} ms"
    if key.endswith(("count", "blocks", "weight", "pid")) or isinstance(value, float | str):
        return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
    return f"{name} {format_size(value)}"


def between(before: LedgerSnapshot | None, after: LedgerSnapshot) -> Iterator[Event]:
    """The events from one snapshot of a device to the next; ``before`` is None at first sight."""
    if before is None:
        yield Event("ledger", after.device, "", "", {"capacity": after.capacity})
    elif (before.capacity, before.headroom) != (after.capacity, after.headroom):
        figures = {"capacity": after.capacity, "headroom": after.headroom}
        yield Event("capacity", after.device, "", "", figures)
    old = {} if before is None else {account.instance: account for account in before.accounts}
    new = {account.instance: account for account in after.accounts}
    reaps = 0 if before is None else after.reaps - before.reaps
    for instance in old.keys() - new.keys():
        yield from _gone(after.device, old[instance], reaps)
    for instance, account in new.items():
        for kind, figures_of in _changes(old.get(instance), account):
            yield Event(kind, after.device, instance, account.name, figures_of)


def _gone(device: str, account: AccountSnapshot, reaps: int) -> Iterator[Event]:
    where = (device, account.instance, account.name)
    if account.alive and reaps <= 0:
        yield Event("left", *where, {})
        return
    if account.alive:
        yield Event("died", *where, _pid(account))
    yield Event("reaped", *where, {"charge": account.charge})


def _pid(account: AccountSnapshot) -> dict[str, Figure]:
    return {"pid": account.pids[0]} if account.pids else {}


def _changes(
    old: AccountSnapshot | None, new: AccountSnapshot
) -> Iterator[tuple[str, dict[str, Figure]]]:
    if old is None:
        settings = {"guarantee": new.guarantee, "limit": new.limit, "weight": new.weight}
        yield "joined", {**_pid(new), **settings}
        if new.ready:
            yield "ready", {}
        if new.asleep:
            yield "asleep", {}
        if not new.alive:
            yield "died", {}
        return
    if new.ready and not old.ready:
        yield "ready", {}
    if new.asleep != old.asleep:
        yield "asleep" if new.asleep else "awake", {}
    if old.alive and not new.alive:
        yield "died", _pid(old)
    for setting in ("limit", "guarantee", "weight"):
        if getattr(old, setting) != getattr(new, setting):
            yield setting, {"before": getattr(old, setting), "after": getattr(new, setting)}
    # Counters begin anew with a new owner, and then say nothing about what went before.
    if new.refused > old.refused:
        yield "refused", {"count": new.refused - old.refused, "demand": new.demand}
    if new.waits > old.waits:
        us = max(0, new.waited_us - old.waited_us)
        yield "waited", {"count": new.waits - old.waits, "waited_us": us}
    if new.reclaimed > old.reclaimed:
        blocks = max(0, new.evictions_by_pressure - old.evictions_by_pressure)
        yield "reclaim", {"size": new.reclaimed - old.reclaimed, "cached_blocks": blocks}
    aside = [sum(m.set_aside for m in each.members) for each in (old, new)]
    if aside[0] != aside[1]:
        yield "set aside", {"before": aside[0], "after": aside[1]}
