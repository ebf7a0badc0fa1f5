"""A simulated engine on a real page pool and a real account; see ``kvcached.bench.share``.

It keeps vLLM's manners: running requests first, the last one preempted where none of them can go
on, waiting requests in their order, blocks of a finished request cached.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from kvcached.bench.share_load import Arrival
from kvcached.ledger import Ledger
from kvcached.pages import PagePool
from kvcached.units import ceil_div
from kvcached.vmm_ops import Blocks

BLOCK_TOKENS = 16
BLOCKS_PER_PAGE = 16
PAGE_BYTES = 2 << 20
TOKENS_PER_S = 40.0
MAX_RUNNING = 64
ENDLESS_QUEUE = 16
"""Requests that always wait at an engine whose load is endless."""


@dataclass(slots=True)
class Request:
    """One request on its way through an engine. Blocks are counted, not named, until it runs."""

    arrived_s: float
    prompt_blocks: int
    output_blocks: int
    blocks: list[int] = field(default_factory=list)
    grown: int = 0
    run: int = 0  # counts its starts: what was planned for an earlier one is void


class Engine:
    """One instance: queue, running requests, page pool. One simulated step at a time."""

    def __init__(
        self,
        ledger: Ledger,
        name: str,
        load: Iterator[Arrival],
        *,
        endless: bool = False,
        preempt: bool = False,
    ) -> None:
        self.name = name
        self._now = 0.0
        self._load = load
        self._next = next(load, None)
        self._queue_most = ENDLESS_QUEUE if endless else 1 << 30
        self._member = ledger.attach(name, name, PAGE_BYTES)
        if not self._member.pin(PAGE_BYTES):
            raise RuntimeError(f"{name}: no memory for its pinned page")
        self.account = ledger.join(name, name, PAGE_BYTES)
        self.account.describe(PAGE_BYTES // BLOCKS_PER_PAGE, BLOCK_TOKENS, PAGE_BYTES)
        pages = (ledger.capacity - ledger.headroom) // PAGE_BYTES
        self.pool = PagePool(
            Blocks(pages * BLOCKS_PER_PAGE, BLOCKS_PER_PAGE),
            self.account,
            PAGE_BYTES,
            warm_low=1,
            warm_high=4,
            preempt=preempt,
            clock=lambda: self._now,
            on_evict=lambda _: None,
        )
        self.pool.publish()
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._events: list[tuple[float, int, int, Request]] = []  # when, order, its run, whose
        self._ahead: set[int] = set()  # pages that were mapped before any use
        self._order = 0
        self.short = False  # whether blocks were refused in this step
        self.refused_bytes = 0  # what it would have held with them
        self.waits: list[float] = []
        self.finished = self.preempted = 0

    def due(self, now: float) -> bool:
        """Whether a step would do anything."""
        return bool(
            self.waiting
            or (self._next is not None and self._next.at_s <= now)
            or (self._events and self._events[0][0] <= now)
            or self.account.pressed()
        )

    def step(self, now: float) -> None:
        """What an engine does in one step: gives back, goes on, admits, says what it holds."""
        self._now = now
        self.pool.relieve()
        self._arrive(now)
        self.short = False
        self._go_on(now)
        if not self.short:
            self._admit(now)
        if not self.short:
            self.account.set_demand(0)
        self.pool.settle(idle=not self.running)
        self.carry()
        self.pool.publish()

    def _arrive(self, now: float) -> None:
        while (
            self._next is not None
            and self._next.at_s <= now
            and len(self.waiting) < self._queue_most
        ):
            row = self._next
            self.waiting.append(
                Request(
                    now if self._queue_most == ENDLESS_QUEUE else row.at_s,
                    max(1, ceil_div(row.prompt_tokens, BLOCK_TOKENS)),
                    ceil_div(row.output_tokens, BLOCK_TOKENS),
                )
            )
            self._next = next(self._load, None)

    def _go_on(self, now: float) -> None:
        """Running requests that have filled a block get another one, or end."""
        while self._events and self._events[0][0] <= now:
            at_s, _, run, request = heapq.heappop(self._events)
            if run != request.run:
                continue
            if request.grown == request.output_blocks:
                self._finish(request)
                continue
            while request.run == run and (blocks := self._get(1)) is None:
                self._preempt()
            if request.run == run:
                request.blocks += blocks or []
                request.grown += 1
                self._plan(request, at_s)

    def _admit(self, now: float) -> None:
        while self.waiting and len(self.running) < MAX_RUNNING and not self.pool.closed:
            request = self.waiting[0]
            blocks = self._get(request.prompt_blocks)
            if blocks is None:
                return
            self.waiting.popleft()
            if request.run == 0:
                self.waits.append(now - request.arrived_s)
            request.blocks, request.grown = blocks, 0
            request.run += 1
            self.running.append(request)
            self._plan(request, now)

    def _get(self, count: int) -> list[int] | None:
        if count > self.pool.blocks.free_blocks:
            self.pool.prefer_growth(count)
            if not self.pool.ensure(count):
                pages = ceil_div(count - self.pool.blocks.available(), BLOCKS_PER_PAGE)
                self.short = True
                self.refused_bytes = (self.pool.blocks.present_pages + pages) * PAGE_BYTES
                room = MAX_RUNNING - len(self.running)
                queued = sum(
                    r.prompt_blocks for r, _ in zip(self.waiting, range(room), strict=False)
                )
                self.pool.want(max(count, queued))
                return None
        return self.pool.blocks.alloc(count)

    def _plan(self, request: Request, from_s: float) -> None:
        self._order += 1
        at_s = from_s + BLOCK_TOKENS / TOKENS_PER_S
        heapq.heappush(self._events, (at_s, self._order, request.run, request))

    def _finish(self, request: Request) -> None:
        self._end(request)
        self.finished += 1

    def _preempt(self) -> None:
        request = self.running[-1]
        self._end(request)
        self.waiting.appendleft(request)
        self.preempted += 1

    def _end(self, request: Request) -> None:
        self.running.remove(request)
        self.pool.blocks.free(request.blocks, cached=True)
        request.blocks = []
        request.run += 1

    def carry(self) -> None:
        """What the processes that map would do, at once."""
        commands = self.pool.take_commands()
        if commands is None:
            return
        if commands.unmap:
            self._member.released(len(commands.unmap) * PAGE_BYTES)
        # A page that was mapped ahead is named again when it is needed, or given up unused.
        self._member.created(len({*commands.map, *commands.ahead} - self._ahead) * PAGE_BYTES)
        self._ahead = (self._ahead | {*commands.ahead}) - {*commands.map, *commands.unmap}

    def below_guarantee(self, guarantee_bytes: int) -> bool:
        """Whether blocks were refused in the last step although they lie within the guarantee."""
        return self.short and self.refused_bytes <= guarantee_bytes

    def close(self) -> None:
        """Ends the instance as its death would: the ledger takes everything back."""
        self._member.close()
        self.account.close()
