"""What travels from a page pool to the processes that map, and what a pool counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Commands:
    """What the mapping processes must do with pages, by id; ``map`` before the next step.

    ``unmap`` waits for the work that may still touch the pages. ``map`` are pages that blocks of
    the step lie on; a page that was sent ``ahead`` is named again by the first step that uses it.
    ``ahead`` are pages under a lease that no block uses yet: mapped when there is time.
    """

    unmap: tuple[int, ...]
    map: tuple[int, ...]
    ahead: tuple[int, ...] = ()


@dataclass(slots=True)
class PageCounters:
    """Events since the pool was made; plain numbers for logs and statistics."""

    mapped: int = 0
    mapped_ahead: int = 0  # of those, before any block used them
    unmapped: int = 0
    cancelled: int = 0  # wanted again before the command left
    refused: int = 0  # leases refused while blocks were missing
    reclaimed: int = 0  # pages given back because others wanted memory
    evicted_blocks: int = 0  # cached blocks lost to that
