"""The mapping half, and both halves together.

``PageMapper`` lives in each process that maps memory for an instance: it carries out the page
pool's commands on an arena and tells the ledger what exists. ``ElasticCache`` joins a page pool
and a mapper in one process: an engine whose scheduler and worker are one, and our own tools.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence

from kvcached.commands import Commands
from kvcached.errors import KvcachedError, OutOfMemoryError
from kvcached.layout import BlockLayout
from kvcached.ledger import Account, Ledger, Member
from kvcached.pages import PagePool
from kvcached.units import format_size
from kvcached.vmm_ops import Arena, Backend, Blocks, Mapper

logger = logging.getLogger(__name__)

PINNED_PAGE = 0
_RETRY_S = 0.01
_ANSWER_S = 5.0  # what a driver may take to answer at all
_CLOSE_S = 5.0


class PageMapper:
    """Maps pages of one instance in this process and accounts for them.

    Construction reserves the addresses and maps the pinned page; where the device's memory is in
    active use by others it waits for that, and says so. A thread of the core does the mapping
    (``vmm_ops.Mapper``). Not thread-safe: one worker thread.
    """

    def __init__(
        self,
        ledger: Ledger,
        member: Member,
        backend: Backend,
        layout: BlockLayout,
        *,
        map_timeout_s: float,
        zero_holes: bool = False,
        on_refusal: Callable[[], None] | None = None,
    ) -> None:
        """``zero_holes`` backs addresses without a page with shared zeros, which are charged as
        long as the mapper is open, and takes one mapping for each of them when it opens.
        ``on_refusal`` is called when the device refuses leased memory, before it is asked again:
        whoever accounts for what others use on it may look anew.
        """
        self.layout = layout
        self._ledger = ledger
        self._member = member
        self._map_timeout_s = map_timeout_s
        self._on_refusal = on_refusal
        self._quarantined = 0
        if zero_holes:
            self._charge(layout.zero_bytes)
        # Handles are kept while the mapper has a use for them; it releases them when it has none.
        self.arena = Arena(
            backend,
            layout.arena_regions(),
            layout.num_pages,
            layout.size_bytes,
            pool_bytes=layout.size_bytes,
            zero_holes=zero_holes,
        )
        self.core = Mapper(self.arena, member.core)
        try:
            self._pin([PINNED_PAGE])
        except KvcachedError:
            self.core.close()
            raise

    def apply(self, commands: Commands, stream: int = 0) -> None:
        """Carries out commands: returns when the pages that the step needs are mapped.

        Pages are unmapped once the work that is enqueued on ``stream`` (the device's handle of
        it; 0 is the default stream) by now has finished, and others are mapped ahead, while the
        engine goes on. A page that is needed again before it was unmapped is kept.

        Raises OutOfMemoryError where the device refuses leased memory for longer than the map
        timeout, naming the device, the bytes and who holds them, and DriverError where it refuses
        for another reason. The ledger then says what exists, the pages are not mapped.
        """
        self.core.submit(commands.unmap, commands.map, commands.ahead, stream)
        if commands.map:
            self._wait(commands.map)
        self._report_quarantine()

    def drain(self, timeout_s: float) -> bool:
        """Waits until nothing is on its way any more; False if the time was not enough."""
        return self.core.drain(timeout_s)

    def close(self, stream: int = 0) -> None:
        """Unmaps everything behind the work on ``stream``, and leaves the ledger.

        Where that work does not end in time, its memory stays mapped, and charged as long as this
        process lives.
        """
        deadline = time.monotonic() + _CLOSE_S
        self.core.clear(stream)
        while not (gone := self.core.drain(max(0.0, deadline - time.monotonic()))):
            if time.monotonic() > deadline:
                break
            time.sleep(_RETRY_S)
            self.core.clear(stream)  # a fence that could not be recorded is tried again
        self.core.close()
        self._report_quarantine()
        if gone:
            if self.arena.zero_bytes():
                self.arena.uncover()
            self._member.close()
        else:
            logger.error(
                "kvcached: work on %s did not end; %s stay mapped and charged",
                self._ledger.device,
                format_size(self._member.held()),
            )

    def hold(self, pages: Iterable[int]) -> None:
        """Maps those of these pages that are not mapped, before there is a scheduler to lease for
        them; waits for memory as construction does. ``drop_held`` ends it.
        """
        missing = [page for page in sorted(set(pages)) if not self.arena.is_mapped(page)]
        if missing:
            self._pin(missing)

    def drop_held(self, stream: int = 0) -> None:
        """Unmaps everything but the pinned page, behind the work on ``stream``."""
        held = tuple(page for page in self.arena.mapped_pages() if page != PINNED_PAGE)
        self.apply(Commands(unmap=held, map=()), stream)
        self.drain(_CLOSE_S)

    def _pin(self, pages: Sequence[int]) -> None:
        self._charge(len(pages) * self.layout.page_bytes)
        self.core.need(pages)
        self._wait(pages)

    def _charge(self, size: int) -> None:
        """Books bytes without a lease, as soon as the ledger has them; says that it waits."""
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

    def _wait(self, pages: Sequence[int]) -> None:
        """Waits until pages are mapped; where the device refuses, asks it again for a while."""
        deadline = time.monotonic() + self._map_timeout_s
        warned = False
        try:
            while (refusal := self._refusal(pages, deadline)) is not None:
                size = self.core.missing(pages) * self.layout.page_bytes
                if time.monotonic() > deadline:
                    raise OutOfMemoryError(
                        f"{self._ledger.device} refused {format_size(size)} under a lease for "
                        f"{self._map_timeout_s:g} s: {refusal}. Holders: {self._holders()}. "
                        "Another program may have taken the memory."
                    )
                self._member.set_demand(size)  # others give back, so that the device can give
                if not warned:
                    if self._on_refusal is not None:
                        self._on_refusal()
                    logger.warning(
                        "kvcached: %s refuses %s; retrying", self._ledger.device, format_size(size)
                    )
                    warned = True
                time.sleep(_RETRY_S)
        except KvcachedError:
            self.core.give_up(pages)
            raise
        finally:
            self._member.set_demand(0)

    def _refusal(self, pages: Sequence[int], deadline: float) -> str | None:
        """The device's words where it has no memory for the pages; None once they are mapped."""
        try:
            mapped = self.core.wait(pages, max(_ANSWER_S, deadline - time.monotonic()))
        except OutOfMemoryError as error:
            return str(error)
        return None if mapped else "it does not answer"

    def _report_quarantine(self) -> None:
        quarantined = self.core.quarantined_bytes()
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

    ``alloc`` answers None on a shortage; the caller queues or preempts. The pages of the blocks
    that it hands out are mapped; others are mapped ahead and unmapped a moment later. After an
    exception of the device's the cache can only be closed. Not thread-safe.
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
        zero_holes: bool = False,
    ) -> None:
        pinned = layout.page_bytes + (layout.zero_bytes if zero_holes else 0)
        self.member: Member = ledger.attach(instance, name, pinned)
        try:
            self.mapper = PageMapper(
                ledger,
                self.member,
                backend,
                layout,
                map_timeout_s=map_timeout_s,
                zero_holes=zero_holes,
            )
        except KvcachedError:
            self.member.close()
            raise
        self.account: Account = ledger.join(instance, name, pinned)
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
                self._settle()  # what was leased on the way is used, or goes back
                return None
        if self._short:
            self._short = False
            self.account.set_demand(0)
        ids = blocks.alloc(count)
        self._settle()
        return ids

    def free(self, ids: Sequence[int], cached: bool = False) -> None:
        """Ends the use of blocks; with ``cached`` their contents stay until others need room."""
        self.pool.blocks.free(ids, cached)
        self._settle()

    def relieve(self) -> int:
        """Gives back what others want; returns the bytes."""
        given = self.pool.relieve()
        self._flush()
        return given

    def _settle(self) -> None:
        self.pool.settle(idle=self.pool.blocks.used_blocks <= 1)
        self._flush()

    def _flush(self) -> None:
        commands = self.pool.take_commands()
        if commands is not None:
            self.mapper.apply(commands)
        self.pool.publish()

    def close(self) -> None:
        """Gives everything back and leaves the ledger."""
        self.mapper.close()
        self.account.close()
