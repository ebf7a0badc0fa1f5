"""The blocks of an SGLang engine on elastic pages.

SGLang's allocators hand out slots, or pages of slots: blocks. Its prefix cache keeps blocks that
are in use here; what it gives up on request is what kvcached calls cached.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import Enum, auto
from typing import Protocol

import torch

from kvcached.engines.sglang.ranks import AgreedAccount, together
from kvcached.ledger import Account
from kvcached.pages import PagePool
from kvcached.units import ceil_div


class PrefixCache(Protocol):
    """What kvcached asks of SGLang's prefix cache, and of the requests that hold parts of it."""

    evicted_tokens: int
    """Slots that the cache has given up so far, whoever asked for it."""

    def evictable_tokens(self) -> int:
        """Slots that no request needs. Any thread may ask."""

    def evict(self, tokens: int) -> None:
        """Frees at least so many of them, longest unused first, as far as there are any."""

    def held_slots(self) -> Iterable[torch.Tensor]:
        """The slots that requests hold, whether the cache has them too or not. They may name
        more, and slots twice.
        """


class SlotPages(PagePool):
    """The page pool of an engine whose prefix cache is the engine's own."""

    block_tokens = 1
    cache: PrefixCache | None = None
    aside: list[int]
    _counted: tuple[tuple[int, ...], int] = ((), 0)  # when, and what
    _found = 0  # blocks that the cache answered
    _computed = 0

    def bind(self, cache: PrefixCache, block_tokens: int) -> None:
        """Names the cache; called once, before any block is cached."""
        self.cache = cache
        self.block_tokens = block_tokens

    def evictable_blocks(self) -> int:
        """Blocks in use that only the cache holds. Any thread may ask."""
        return 0 if self.cache is None else self.cache.evictable_tokens() // self.block_tokens

    def blocks_in_use(self) -> int:
        return self.blocks.used_blocks - self.evictable_blocks()

    def count_admitted(self, found: int, computed: int) -> None:
        """A request was admitted: tokens whose prefix the cache had, and tokens to be computed."""
        self._found += found // self.block_tokens
        self._computed += ceil_div(computed, self.block_tokens)

    def cache_counts(self) -> tuple[int, int, int]:
        evicted = 0 if self.cache is None else self.cache.evicted_tokens // self.block_tokens
        return self._found, self._computed, evicted

    def idle_pages(self) -> int:
        """Pages of which only the cache holds blocks.

        Counted where others may want them; otherwise as many as the cached blocks could fill,
        since counting walks over all that requests hold.
        """
        blocks = self.blocks
        with_contents = blocks.present_pages - blocks.empty_pages
        if not self._fair.pressed() or self.cache is None:
            return max(0, min(self.evictable_blocks() // blocks.blocks_per_page, with_contents - 1))
        state = (blocks.misses, blocks.used_blocks, blocks.present_pages, self.evictable_blocks())
        if state != self._counted[0]:
            self._counted = (state, max(0, with_contents - len(self._held_pages(self.cache))))
        return self._counted[1]

    def _held_pages(self, cache: PrefixCache) -> set[int]:
        blocks = self.blocks
        held = {0} | {block // blocks.blocks_per_page for block in self.aside}
        tokens = [slots.reshape(-1) for slots in cache.held_slots()]
        if tokens:
            per_page = blocks.blocks_per_page * self.block_tokens
            pages = torch.unique(torch.cat(tokens).to(torch.int64) // per_page)
            held.update(page for page in pages.tolist() if blocks.used_in(page))
        return held

    def give_up(self, pages: int) -> int:
        """As ``PagePool.give_up``; the cache gives its oldest blocks first."""
        blocks = self.blocks
        wanted = min(pages, blocks.empty_pages + self.idle_pages())
        while (missing := wanted - blocks.empty_pages) > 0:
            before = self.evictable_blocks()
            self.evict(missing * blocks.blocks_per_page)
            self.counters.evicted_blocks += before - self.evictable_blocks()
            if self.evictable_blocks() == before:
                break
        return super().give_up(pages)

    def evict(self, count: int) -> None:
        """Takes at least ``count`` blocks out of the cache, as far as it has them."""
        if self.cache is not None and count > 0 and self.evictable_blocks() > 0:
            self.cache.evict(count * self.block_tokens)


class View(Enum):
    """What the number of available slots is asked for."""

    DECIDING = auto()
    """What may be admitted: all that can be had, also from others."""
    COUNTING = auto()
    """Statistics and leak checks: every slot that is not in use."""
    RETRACTING = auto()
    """What can be handed out now, for certain. At least one block: where not even that is left,
    what follows a retraction sees to the last request.
    """


class Slots:
    """Hands out blocks, all of whose pages are leased. It belongs to the scheduler's thread.

    Blocks set *aside* are in use for nobody yet: what was found available at a check cannot be
    taken by another process before the allocation that follows.
    """

    def __init__(self, pages: SlotPages, account: Account | AgreedAccount) -> None:
        self.pages = pages
        self.blocks = pages.blocks
        self.account = account
        self.short = False  # something was refused in this step
        self._view = View.DECIDING
        self._used: set[int] = set()  # handed out
        self._aside = pages.aside = []
        self._promised = 0
        self._grantable = (-1, 0)  # the ledger's version, pages

    # --- what is there

    def unused(self) -> int:
        """Blocks that nobody uses, whether memory is behind them or not."""
        return self.blocks.num_blocks - self.blocks.used_blocks + len(self._aside)

    def unused_ids(self) -> list[int]:
        """The same by id."""
        return [block for block in range(1, self.blocks.num_blocks) if block not in self._used]

    def owned(self) -> int:
        """Blocks that can be handed out at once."""
        return self.blocks.available() + len(self._aside)

    @together
    def available(self) -> int:
        """Blocks as SGLang should see them at this moment."""
        if self._view is View.COUNTING:
            return self.unused()
        if self._view is View.RETRACTING:
            return max(1, self.owned())
        return min(self.unused(), self.owned() + self._obtainable())

    def _obtainable(self) -> int:
        """Blocks of absent pages that fair shares allow this engine, at once or soon."""
        absent = self.blocks.num_pages - self.blocks.present_pages
        return min(absent, self._pages_granted()) * self.blocks.blocks_per_page

    def _pages_granted(self) -> int:
        self.pages.publish()
        version = self.account.version()
        if version != self._grantable[0]:
            page = self.pages.page_bytes
            plan = self.account.target(page, demand=self.blocks.num_pages * page)
            self._grantable = (version, plan.grant // page)
        return self._grantable[1]

    def most(self) -> int:
        """The blocks that this engine could have if the others kept only what is theirs."""
        pages = self.account.ceiling() // self.pages.page_bytes
        return min(pages * self.blocks.blocks_per_page, self.blocks.num_blocks) - 1

    @contextmanager
    def seen_as(self, view: View) -> Iterator[None]:
        """What ``available`` means while the block runs."""
        before, self._view = self._view, view
        try:
            yield
        finally:
            self._view = before

    def retracts_to_one(self, requests: int) -> bool:
        """Whether a retraction asks if the last request fits: not for SGLang to decide."""
        return self._view is View.RETRACTING and requests <= 1

    # --- handing out

    @together
    def alloc(self, count: int) -> list[int] | None:
        """``count`` blocks, those set aside first; None where memory is short."""
        missing = count - len(self._aside)
        if missing > 0 and not self._make_room(missing):
            return None
        ids, self._aside[:count] = self._aside[:count], []
        if missing > 0:
            more = self.blocks.alloc(missing)
            assert more is not None, "room was made for them"
            ids += more
        self._used.update(ids)
        return ids

    def free(self, ids: list[int]) -> None:
        """Ends the use of blocks. Raises InvalidArgumentError naming a block that is not in use."""
        self.blocks.free(ids)
        self._used.difference_update(ids)

    @together
    def secure(self, count: int) -> bool:
        """Sets blocks aside until they are ``count``; False where memory is short."""
        missing = count - len(self._aside)
        if missing > 0:
            if not self._make_room(missing):
                return False
            more = self.blocks.alloc(missing)
            assert more is not None, "room was made for them"
            self._aside += more
        return True

    def release(self, keep: int) -> None:
        """Gives up what is set aside beyond ``keep`` blocks."""
        beyond = self._aside[keep:]
        if beyond:
            del self._aside[keep:]
            self.blocks.free(beyond)

    def _make_room(self, count: int) -> bool:
        """Makes ``count`` blocks free: from pages that are granted at once, then out of the own
        cache, then by asking others.
        """
        blocks = self.blocks
        self.pages.prefer_growth(count)
        self.pages.evict(count - blocks.available())
        if self.pages.ensure(count):
            return True
        self.short = True
        return False

    # --- promises, before anything may be evicted

    def begin_promises(self) -> None:
        """A pass of admission begins; what is set aside is promised already."""
        self._promised = len(self._aside)

    @together
    def promise(self, count: int) -> bool:
        """Sees to it that ``count`` blocks more than promised so far can be handed out before the
        next step, from free blocks or out of the cache as far as requests admitted so far do not
        hold it. Evicts nothing: the prefixes of requests in line were looked up already.
        """
        wanted = self._promised + count - len(self._aside)
        self.pages.prefer_growth(wanted)
        if not self.pages.ensure(wanted - self.pages.evictable_blocks()):
            self.short = True
            return False
        self._promised += count
        return True

    def take_back(self, count: int) -> None:
        """Ends a promise that nobody needs."""
        self._promised -= count

    def clear(self) -> None:
        """Ends the use of all blocks."""
        self.release(0)
        self.free(list(self._used))


def blocks_for(tokens: int, block_tokens: int) -> int:
    """The most blocks that so many slots more can take, at the end of whatever is there."""
    return tokens if block_tokens == 1 else ceil_div(max(0, tokens), block_tokens) + 1
