"""The mapping half, and both halves together.

``PageMapper`` lives in each process that maps memory for an instance: it carries out the page
pool's commands on an arena and tells the ledger what exists. ``ElasticCache`` joins a page pool
and a mapper in one process: an engine whose scheduler and worker are one, and our own tools.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from kvcached.errors import DriverError, KvcachedError, OutOfMemoryError
from kvcached.layout import BlockLayout
from kvcached.ledger import Account, Ledger, Member
from kvcached.pages import Commands, PagePool
from kvcached.units import format_size
from kvcached.vmm_ops import Arena, Backend, Blocks

logger = logging.getLogger(__name__)

PINNED_PAGE = 0
_RETRY_S = 0.01


class PageMapper:
    """Maps pages of one instance in this process and accounts for them.

    Construction reserves the addresses and maps the pinned page; where the device's memory is in
    active use by others it waits for that, and says so. Not thread-safe: one worker thread.
    """

    def __init__(
        self,
        ledger: Ledger,
        member: Member,
        backend: Backend,
        layout: BlockLayout,
        *,
        map_timeout_s: float,
    ) -> None:
        self.layout = layout
        self._ledger = ledger
        self._member = member
        self._map_timeout_s = map_timeout_s
        self._quarantined = 0
        self.arena = Arena(backend, layout.arena_regions(), layout.num_pages, layout.size_bytes)
        self._pin()

    def apply(self, commands: Commands) -> None:
        """Carries out commands: unmaps, tells the ledger what was released, then maps.

        Raises OutOfMemoryError where the device refuses leased memory for longer than the map
        timeout, naming the device, the bytes and who holds them, and DriverError where it refuses
        for another reason. The ledger then says what exists, the pages are not mapped.
        """
        if commands.unmap:
            self.arena.unmap(commands.unmap)
            self._book_what_exists()
        if commands.map:
            # Booked before it exists: a reader may see too much for a moment, never too little.
            self._member.created(len(commands.map) * self.layout.page_bytes)
            self._map_booked(commands.map)

    def close(self) -> None:
        """Unmaps everything and leaves the ledger."""
        mapped = self.arena.mapped_pages()
        if mapped:
            self.arena.unmap(mapped)
        self.arena.trim()
        self.arena.retry_quarantine()
        self._book_what_exists()
        self._member.close()

    def _pin(self) -> None:
        size = self.layout.page_bytes
        deadline = None
        while not self._member.pin(size):
            now = time.monotonic()
            if deadline is None or now > deadline:
                deadline = now + 5.0
                logger.warning(
                    "kvcached: waiting for %s on %s to start: all of it is in use (%s)",
                    format_size(size),
                    self._ledger.device,
                    self._holders(),
                )
            time.sleep(_RETRY_S)
        self._map_booked([PINNED_PAGE])

    def _map_booked(self, pages: Sequence[int]) -> None:
        """Maps pages whose bytes are booked already, or corrects the books and raises."""
        size = len(pages) * self.layout.page_bytes
        deadline = time.monotonic() + self._map_timeout_s
        warned = False
        try:
            while (refusal := self._try_map(pages, size)) is not None:
                if time.monotonic() > deadline:
                    raise OutOfMemoryError(
                        f"{self._ledger.device} refused {format_size(size)} under a lease for "
                        f"{self._map_timeout_s:g} s: {refusal}. Holders: {self._holders()}. "
                        "Another program may have taken the memory."
                    )
                self._member.set_demand(size)  # others give back, so that the device can give
                if not warned:
                    logger.warning(
                        "kvcached: %s refuses %s; retrying", self._ledger.device, format_size(size)
                    )
                    warned = True
                time.sleep(_RETRY_S)
        finally:
            self._member.set_demand(0)
            self._book_what_exists()

    def _try_map(self, pages: Sequence[int], size: int) -> str | None:
        """Maps the pages; the device's words where it has no memory for them."""
        # What stays in quarantine comes on top of what the owner has leased for these pages.
        self.arena.retry_quarantine()
        extra = self.arena.created_bytes() + size - self._member.held()
        if extra > 0 and not self._member.pin(extra):
            return f"no room beside {format_size(self.arena.quarantined_bytes())} in quarantine"
        try:
            self.arena.map(pages)
        except OutOfMemoryError as error:
            return str(error)
        except DriverError as error:
            # A page whose unmap was refused is free again when the retry of that succeeds.
            if not self.arena.quarantined_bytes():
                raise
            return str(error)
        return None

    def _book_what_exists(self) -> None:
        """Makes the ledger say what the arena says: memory in quarantine may have come or gone."""
        difference = self.arena.created_bytes() - self._member.held()
        if difference > 0:
            self._member.created(difference)
        elif difference < 0:
            self._member.released(-difference)
        quarantined = self.arena.quarantined_bytes()
        if quarantined > self._quarantined:
            logger.warning(
                "kvcached: %s did not take back %s; it stays charged and is tried again: %s",
                self._ledger.device,
                format_size(quarantined),
                self.arena.last_failure(),
            )
        self._quarantined = quarantined

    def _holders(self) -> str:
        accounts = self._ledger.snapshot().accounts
        return ", ".join(f"{a.name} {format_size(a.charge)}" for a in accounts) or "nobody"


class ElasticCache:
    """A whole instance in one process: blocks, pages, lease and mapping.

    ``alloc`` answers None on a shortage; the caller queues or preempts. Commands are applied at
    once. After an exception of the device's the cache can only be closed. Not thread-safe.
    """

    def __init__(
        self,
        ledger: Ledger,
        backend: Backend,
        layout: BlockLayout,
        *,
        instance: str,
        name: str,
        warm_low: int = 1,
        warm_high: int = 4,
        map_timeout_s: float = 30.0,
    ) -> None:
        self.member: Member = ledger.attach(instance, name, layout.page_bytes)
        try:
            self.mapper = PageMapper(
                ledger, self.member, backend, layout, map_timeout_s=map_timeout_s
            )
        except KvcachedError:
            self.member.close()
            raise
        self.account: Account = ledger.join(instance, name, layout.page_bytes)
        self._short = False
        self.pool = PagePool(
            Blocks(layout.num_blocks, layout.blocks_per_page),
            self.account,
            layout.page_bytes,
            warm_low=warm_low,
            warm_high=warm_high,
            on_evict=lambda _: None,
        )

    def alloc(self, count: int) -> list[int] | None:
        """``count`` block ids on mapped pages, or None where memory is short."""
        blocks = self.pool.blocks
        if count > blocks.free_blocks and 0 < count <= blocks.num_blocks:
            self.pool.prefer_growth(count)
            if not self.pool.ensure(count):
                self._short = True
                return None
        if self._short:
            self._short = False
            self.account.set_demand(0)
        ids = blocks.alloc(count)
        self._flush()
        return ids

    def free(self, ids: Sequence[int], cached: bool = False) -> None:
        """Ends the use of blocks; with ``cached`` their contents stay until others need room."""
        self.pool.blocks.free(ids, cached)
        self.pool.settle(idle=self.pool.blocks.used_blocks <= 1)
        self._flush()

    def relieve(self) -> int:
        """Gives back what others want; returns the bytes."""
        given = self.pool.relieve()
        self._flush()
        return given

    def _flush(self) -> None:
        commands = self.pool.take_commands()
        if commands is not None:
            self.mapper.apply(commands)
        self.pool.publish()

    def close(self) -> None:
        """Gives everything back and leaves the ledger."""
        self.mapper.close()
        self.account.close()
