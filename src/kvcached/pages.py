"""The scheduler's half: which pages an instance has, and when they come and go.

A page pool joins the block allocator of the core (which blocks lie on which page) with the
instance's account in the ledger (how many bytes it may create). It decides; it maps nothing.
Its decisions leave as commands, which the engine carries to the processes that map.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from kvcached.answers import Answers
from kvcached.commands import Commands, PageCounters
from kvcached.errors import ConfigError, KvcachedError
from kvcached.sharing import FairShare, Rival
from kvcached.traffic import Traffic
from kvcached.units import ceil_div
from kvcached.vmm_ops import Blocks

# An engine counts as working for so long after its last request: between two requests of a client
# its cache is not idle. What it holds above its fair share goes at once all the same.
REST_S = 0.5


class Lender(Rival, Protocol):
    """What a page pool needs of an account in the ledger; see ``kvcached.ledger.Account``, and
    ``kvcached.group`` for an instance on several devices.
    """

    def lease(self, size_bytes: int) -> bool: ...
    def give_back(self, size_bytes: int) -> None: ...
    def leasable(self) -> int: ...
    def charge(self) -> int: ...
    def set_demand(self, size_bytes: int) -> None: ...
    def publish(self, in_use: int, cached: int, warm: int, working: bool = False) -> None: ...
    def count_reclaimed(self, size_bytes: int) -> None: ...
    def publish_cache(self, hits: int, misses: int, evictions: int, by_pressure: int) -> None: ...
    def asked(self) -> int: ...
    def answer(self, size_bytes: int) -> None: ...


class PagePool:
    """The pages under one instance's blocks. Not thread-safe: it belongs to the scheduler.

    ``page_bytes`` is what one page costs on the device: all regions, all processes that map it.
    ``on_evict`` is told the ids of cached blocks whose contents are lost with a reclaimed page.
    ``max_cached_blocks`` bounds the prefix cache; None is no bound.
    With ``preempt``, while others wait for memory that the engine uses above its fair share, it
    gets no further block: so it preempts.
    The page of block 0 counts as leased and mapped from the start (the member pins it).
    """

    def __init__(
        self,
        blocks: Blocks,
        account: Lender,
        page_bytes: int,
        *,
        warm_low: int,
        warm_high: int,
        max_cached_blocks: int | None = None,
        preempt: bool = False,
        clock: Callable[[], float] = time.monotonic,
        on_evict: Callable[[Sequence[int]], None],
    ) -> None:
        if not 0 <= warm_low <= warm_high:
            raise ConfigError(f"warm pages: low={warm_low} must be between 0 and high={warm_high}")
        self.blocks = blocks
        self.page_bytes = page_bytes
        self.counters = PageCounters()
        self.refused_bytes = 0  # of the last lease that was refused while blocks were missing
        self._account = account
        self._warm_low = warm_low
        self._warm_high = warm_high
        self._max_cached_blocks = max_cached_blocks
        self._preempt = preempt
        self._on_evict = on_evict
        self._fair = FairShare(account, page_bytes)
        self._owed = 0  # bytes in use above the fair share that others wait for
        self._clock = clock
        self._busy = False
        self._worked_s = float("-inf")  # when it was last seen to work
        self._working = False  # as published
        # Both keep insertion order, and neither command has left yet.
        self._to_map: dict[int, None] = {}
        self._to_unmap: dict[int, None] = {}
        # Sent ahead, and not used since: the device may have refused them.
        self._ahead: dict[int, None] = {}
        self._traffic = Traffic(blocks.present_pages - blocks.empty_pages)
        self._reclaimed_before = 0
        self._answers = Answers()

    # --- growing

    def ensure(self, count: int) -> bool:
        """Makes ``count`` blocks available, cached ones included, or changes nothing.

        On a shortage the missing bytes become the account's demand, which wakes the others.
        """
        if self.blocks.available() < count and self._owed and not self._fair.pressed():
            self._owe(0)  # nobody waits any more
        missing = count - self.blocks.available()
        if missing <= 0:
            return True
        pages = ceil_div(missing, self.blocks.blocks_per_page)
        if self._grow(pages):
            return True
        if pages <= self._absent():
            self.counters.refused += 1
            self.refused_bytes = max(1, pages - len(self._to_unmap)) * self.page_bytes
            self._account.set_demand(self.refused_bytes)
        return False

    def expects(self) -> bool:
        """Whether memory for the lease that was refused last is about to come: others hold unused
        what is this account's by right, and were told.
        """
        plan = self._account.target(self.page_bytes)
        return plan.coming > 0 and plan.grant >= self.refused_bytes

    def want(self, count: int) -> None:
        """Raises the demand, after ``ensure`` was refused, to all ``count`` blocks that would be
        used if they were there. Asking for one request's at a time, memory would come back one
        request a step.
        """
        pages = ceil_div(max(0, count - self.blocks.available()), self.blocks.blocks_per_page)
        pages = min(pages, self._absent()) - len(self._to_unmap)
        if pages > 0:
            self._account.set_demand(pages * self.page_bytes)

    def prefer_growth(self, count: int) -> None:
        """Grows, as far as leases are granted at once, so that ``count`` blocks are free.

        Without it, handing out blocks would evict cached ones while memory lies idle. It raises
        no demand: the blocks are available anyway.
        """
        missing = count - self.blocks.free_blocks
        if missing <= 0 or self._account.others_demand() > 0:
            return  # who waits for memory goes before who can do without
        pages = min(ceil_div(missing, self.blocks.blocks_per_page), self._absent())
        affordable = len(self._to_unmap) + self._account.leasable() // self.page_bytes
        pages = min(pages, affordable)
        if pages > 0:
            self._grow(pages)

    def _absent(self) -> int:
        return self.blocks.num_pages - self.blocks.present_pages

    def _grow(self, pages: int) -> bool:
        if pages > self._absent():
            return False
        kept = list(self._to_unmap)[-pages:]
        fresh = pages - len(kept)
        if not self._may_grow(pages):
            return False
        if fresh and not self._account.lease(fresh * self.page_bytes):
            return False
        # Pages whose unmap has not left are still mapped and leased: they are simply kept. All
        # of them come back before the allocator may choose, so it cannot choose one of them.
        for page in kept:
            del self._to_unmap[page]
            self.blocks.add_page(page)
        self.counters.cancelled += len(kept)
        if fresh:
            for page in self.blocks.grow(fresh):
                self._to_map[page] = None
        self._owe(0)  # who may grow owes nothing
        return True

    def _may_grow(self, pages: int) -> bool:
        """Whether fair shares allow it. Pages about to leave count: others wait for them."""
        if self._account.others_demand() == 0:
            return True
        self.publish()
        return self._fair.may_lease(pages * self.page_bytes)

    # --- giving back

    def settle(self, idle: bool, coming: int = 0, in_line: int = 0) -> None:
        """Brings the warm pages to what the engine is about to need; called in each step.

        Idle, that is the low watermark at most. Busy, they follow the rate at which pages came
        into use (``Traffic``), between the watermarks. ``coming`` blocks that the next step is
        known to need, as far as the engine can tell, have their pages above the high watermark too:
        mapping them in that step would keep it waiting. For ``in_line`` blocks, which later steps
        need, pages that are there stay. With a high watermark of 0 nothing is mapped ahead.

        Where the cache is bounded, the oldest cached blocks above the bound become free first.
        """
        if self._max_cached_blocks is not None:
            excess = self.blocks.cached_blocks - self._max_cached_blocks
            if excess > 0:
                self._on_evict(self.blocks.uncache(excess))
        blocks = self.blocks
        self._traffic.observe(blocks.present_pages - blocks.empty_pages)
        if idle or not self._warm_high:
            coming = in_line = 0
        known = ceil_div(coming, blocks.blocks_per_page)
        later = ceil_div(in_line, blocks.blocks_per_page)
        keep = self._warm_low if idle else max(self._warm_high, known, later)
        excess = blocks.empty_pages - keep
        if excess > 0:
            self._drop(blocks.shrink(excess))
        elif not idle:
            expected = self._traffic.worth_warming(self._warm_high)
            self._warm_up(max(self._warm_low, expected, known))

    def foresee(self, coming: int) -> None:
        """Between steps: maps ahead for ``coming`` blocks, as ``settle`` does for the next step's.
        The caller carries the commands at once.
        """
        if self._warm_high:
            self._warm_up(ceil_div(coming, self.blocks.blocks_per_page))

    def _warm_up(self, target: int) -> None:
        """Grows to so many warm pages, as far as leases are granted at once and nobody waits.

        Pages are given up only above the high watermark and what is known to come, so a busy
        engine does not map and unmap in turn. What others took back is theirs: while
        pages are being reclaimed none are added.
        """
        reclaimed = self.counters.reclaimed - self._reclaimed_before
        self._reclaimed_before += reclaimed
        pages = min(target - self.blocks.empty_pages, self._absent())
        if pages <= 0 or reclaimed or self._account.others_demand() > 0:
            return
        affordable = len(self._to_unmap) + self._account.leasable() // self.page_bytes
        if (pages := min(pages, affordable)) > 0:
            self._grow(pages)

    def relieve(self) -> int:
        """Gives back what fair shares ask for (``kvcached.policy``): warm pages, then whole unused
        pages of cached blocks, longest unused first; before that, what an operator has asked for
        (``Ledger.ask_back``). Returns the bytes given back.

        Call it before each step and whenever the pressure rises. What is in use is not taken:
        the pool is ``closed`` until enough of it has come free.
        """
        if not self._fair.pressed():
            self._owe(0)
            return 0
        given = self._answer()
        self.publish()
        plan = self._fair.news()
        if plan is None:
            return given * self.page_bytes
        self._owe(plan.owed)
        if more := self.give_up(ceil_div(plan.give, self.page_bytes)):
            self.publish()  # the others need not give the same once more
        return (given + more) * self.page_bytes

    def _answer(self) -> int:
        """Gives what an operator has asked for, as far as it is unused; returns the pages."""
        if (asked := self._account.asked()) == 0:
            return 0
        given = self.give_up(ceil_div(asked, self.page_bytes))
        self.publish()  # before the answer: who asked then looks at the numbers
        self._account.answer(asked)
        return given

    @property
    def closed(self) -> bool:
        """Whether the engine should start no request that is not running: others wait for memory
        that it uses above its fair share, which comes back as its requests end.
        """
        return self._owed > 0 and self.blocks_in_use() > 1

    def _owe(self, size_bytes: int) -> None:
        if self._preempt and (size_bytes or self._owed):
            self.blocks.set_bound(self.blocks.used_blocks if size_bytes else None)
        self._owed = size_bytes

    def give_up(self, pages: int) -> int:
        """Gives up to ``pages`` warm or unused cached pages; returns how many."""
        dropped = self.blocks.shrink(pages)
        if len(dropped) < pages:
            more, evicted = self.blocks.reclaim(pages - len(dropped))
            if evicted:
                self.counters.evicted_blocks += len(evicted)
                self._on_evict(evicted)
            dropped += more
        self._drop(dropped)
        if dropped:
            self.counters.reclaimed += len(dropped)
            self._account.count_reclaimed(len(dropped) * self.page_bytes)
        return len(dropped)

    def _drop(self, pages: Sequence[int]) -> None:
        never_created = 0
        for page in pages:
            if page in self._to_map:
                del self._to_map[page]
                never_created += 1
            else:
                self._to_unmap[page] = None
        if never_created:
            self.counters.cancelled += never_created
            self._account.give_back(never_created * self.page_bytes)

    # An engine that keeps its prefix cache in blocks that are in use here answers these anew.

    def blocks_in_use(self) -> int:
        """Blocks that requests hold, and block 0. Any thread may ask."""
        return self.blocks.used_blocks

    def idle_pages(self) -> int:
        """Pages on which all blocks with contents are unused and cached."""
        return self.blocks.idle_pages

    def cache_counts(self) -> tuple[int, int, int]:
        """Hits, misses and evictions so far, as the ledger counts them."""
        return self.blocks.hits, self.blocks.misses, self.blocks.evictions

    # --- leaving

    def has_commands(self) -> bool:
        """Whether commands wait to be carried to the processes that map."""
        return bool(self._to_map or self._to_unmap)

    def has_unmaps(self) -> bool:
        """Whether pages wait to be unmapped."""
        return bool(self._to_unmap)

    def take_commands(self, unmap: bool = True) -> Commands | None:
        """The waiting commands, handed over: the caller must carry them, in order. Without
        ``unmap`` the pages to unmap stay: steps that touch them are not even enqueued.
        """
        arrived = self._used(self._ahead) if self._ahead else []
        leaving = tuple(self._to_unmap) if unmap else ()
        if not (arrived or self._to_map or leaving):
            return None
        for page in arrived:
            del self._ahead[page]
        needed = self._used(self._to_map)
        for page in needed:
            del self._to_map[page]
        commands = Commands(leaving, (*arrived, *needed), tuple(self._to_map))
        for page in leaving:
            del self._to_unmap[page]
            self._ahead.pop(page, None)
        self._ahead.update(self._to_map)
        self.counters.unmapped += len(commands.unmap)
        self.counters.mapped += len(needed) + len(commands.ahead)
        self.counters.mapped_ahead += len(commands.ahead)
        self._to_map.clear()
        return commands

    def _used(self, pages: Iterable[int]) -> list[int]:
        return [page for page in pages if self.blocks.used_in(page)]

    def publish(self) -> None:
        """Writes the pool's numbers into the ledger (plain stores, no lock)."""
        blocks, size = self.blocks, self.page_bytes
        idle, empty = self.idle_pages(), blocks.empty_pages
        busy = blocks.present_pages - idle - empty
        hits, misses, evictions = self.cache_counts()
        self._working = self._works() and self._answers.enough(hits, misses)
        self._account.publish(busy * size, idle * size, empty * size, self._working)
        self._account.publish_cache(hits, misses, evictions, self.counters.evicted_blocks)

    def _works(self) -> bool:
        was_busy, self._busy = self._busy, self.blocks_in_use() > 1
        if self._busy or was_busy:
            self._worked_s = self._clock()
        return self._clock() - self._worked_s < REST_S

    def rested(self) -> bool:
        """Whether it is idle for long but still said to work: time to ``relieve``. Any thread."""
        return (
            self._working and self.blocks_in_use() <= 1 and self._clock() - self._worked_s >= REST_S
        )

    def gives(self) -> bool:
        """Whether it holds more than an idle engine does without a cache. Any thread may ask."""
        return self.blocks.present_pages > 1 + self._warm_low

    def check(self) -> None:
        """Adds everything up; raises KvcachedError naming what does not fit."""
        self.blocks.check()
        here = {*self._ahead} - {*self._to_unmap} | {*self._to_map}
        lost = [page for page in here if not self.blocks.is_present(page)]
        kept = [page for page in self._to_unmap if self.blocks.is_present(page)]
        if lost or kept:
            raise KvcachedError(f"integrity: to map but absent {lost}, to unmap but present {kept}")
