"""Foreign memory: what is in use on a device and is nobody's pages.

Weights, activations, contexts, other programs: the ledger does not lend it, so it has to know how
much it is. It is what the device says is in use, less what the ledger says exists. Where the
ledger governs less than the whole device, foreign memory lies in the rest as far as it fits there.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from kvcached.ledger import Ledger

Memory = Callable[[], tuple[int, int]]
"""Asks a device how many bytes are in use, whoever holds them, and how many there are."""

# Members book pages before they create them, so one look may find too little that is foreign, for
# as long as a batch is being created. The largest of a few looks is right unless all of them do.
_LOOKS = 3
_BETWEEN_S = 0.002
_TRIES = 5


def measure(ledger: Ledger, memory: Memory) -> int:
    """Bytes of the ledger's capacity that are foreign now."""
    looks = []
    for look in range(_LOOKS):
        if look:
            time.sleep(_BETWEEN_S)
        looks.append(overlap(ledger, memory))
    return max(0, *looks)


def refresh(ledger: Ledger, memory: Memory) -> None:
    """Measures, and tells the ledger."""
    ledger.set_foreign(measure(ledger, memory))


def keep_fresh(ledger: Ledger, memory: Memory, age_s: float) -> None:
    """Measures where nobody else has for ``age_s`` seconds: one measurement serves all engines."""
    if ledger.foreign_age_s() >= age_s:
        refresh(ledger, memory)


def inside(ledger: Ledger, memory: Memory, size_bytes: int) -> int:
    """What of so many bytes, which are about to be allocated beside pages, does not fit on the
    device beside the ledger's capacity.
    """
    return max(0, size_bytes + min(0, overlap(ledger, memory)))


def overlap(ledger: Ledger, memory: Memory) -> int:
    """How far foreign memory reaches into the ledger's capacity, at one look; negative where so
    much more fits beside it.

    Pages that come or go between two questions would be counted wrongly: then it asks again, and
    at last says rather too much than too little.
    """
    created = ledger.created()
    for _ in range(_TRIES):
        before, (used, total), created = created, memory(), ledger.created()
        if created == before:
            break
    return used - min(before, created) - max(0, total - ledger.capacity)
