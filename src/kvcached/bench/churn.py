"""A simulated engine that a trace keeps busy, on a real page pool; see ``bench.fragmentation``.

Only blocks and pages are played: requests get the blocks of their prompts, one more for each 16
tokens that they generate, and give all back at their end. Either a given number of them runs at
once all the time, or they arrive with the trace's rhythm, scaled so that as many run on average.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvcached.bench.share_load import Arrival, mean_gap_s, over_and_over
from kvcached.ledger import Ledger
from kvcached.pages import PagePool
from kvcached.units import ceil_div
from kvcached.vmm_ops import Blocks

BLOCK_TOKENS = 16
BLOCK_BYTES = 2 << 20
"""A block of Llama 3 8B: 32 layers, 8 heads of 128, K and V, bfloat16, 16 tokens."""
TOKENS_PER_S = 40.0
STEP_S = 0.1
STEPS_PER_BLOCK = round(BLOCK_TOKENS / TOKENS_PER_S / STEP_S)
DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the engine is: ``at_once`` requests all the time if ``steady``, else on average.
    Then the rate swings by ``swing`` of its mean once a day, and is lowest at the start.
    """

    at_once: int
    steady: bool = False
    swing: float = 0.5
    seed: int = 1

    @property
    def most(self) -> int:
        """Requests that run at once, at most."""
        return self.at_once if self.steady else 1 << 30

    def arrivals(self, trace: Sequence[Arrival]) -> Iterator[Arrival]:
        """Endless: the trace from a row on, over and over, as fast as the load wants."""
        lifetime_s = sum(row.output_tokens for row in trace) / len(trace) / TOKENS_PER_S
        scale = lifetime_s / self.at_once / mean_gap_s(trace)
        first = random.Random(self.seed).randrange(len(trace))
        at_s = 0.0
        for gap_s, row in over_and_over(trace, first):
            if not self.steady:
                rate = 1 - self.swing * math.cos(2 * math.pi * at_s / DAY_S)
                at_s += gap_s * scale / rate
            yield Arrival(at_s, row.prompt_tokens, row.output_tokens)


@dataclass(eq=False, slots=True)
class Running:
    """One request: how many blocks it still fills, and those that it has."""

    left: int
    blocks: list[int]


class Churn:
    """One engine; one simulated step at a time. ``cached``: blocks of ended requests stay as
    prefix cache, all but the last, which is not full.
    """

    def __init__(
        self,
        ledger: Ledger,
        load: Load,
        trace: Sequence[Arrival],
        blocks_per_page: int,
        *,
        cached: bool = False,
        name: str = "churn",
    ) -> None:
        self.name = name
        self.now = 0.0
        self.mapped_pages = self.refused = self.finished = 0
        self.page_bytes = page = blocks_per_page * BLOCK_BYTES
        self._arrivals = load.arrivals(trace)
        self._next = next(self._arrivals)
        self._most = load.most
        self._cached = cached
        self._step = 0
        self._member = ledger.attach(name, name, page)
        if not self._member.pin(page):
            raise RuntimeError(f"{name}: no memory for its pinned page")
        self.account = ledger.join(name, name, page)
        self.account.describe(BLOCK_BYTES, BLOCK_TOKENS, page)
        self.pool = PagePool(
            Blocks(ledger.capacity // page * blocks_per_page, blocks_per_page),
            self.account,
            page,
            warm_low=1,
            warm_high=4,
            clock=lambda: self.now,
            on_evict=lambda _: None,
        )
        self.pool.publish()
        self._ahead: set[int] = set()  # pages that were mapped before any use
        # By the step in which they fill a block.
        self.running: list[list[Running]] = [[] for _ in range(STEPS_PER_BLOCK)]

    @property
    def at_once(self) -> int:
        """Requests that run now."""
        return sum(len(group) for group in self.running)

    def step(self) -> None:
        """The next step: gives back what others want, goes on, admits, says what it holds."""
        self._step += 1
        self.now = self._step * STEP_S
        self.pool.relieve()
        turn = self._step % STEPS_PER_BLOCK
        self._go_on(turn)
        while self._next.at_s <= self.now and self.at_once < self._most:
            self._admit(turn, self._next)
            self._next = next(self._arrivals)
        self.pool.settle(idle=self.pool.blocks.used_blocks <= 1)
        self._carry()

    def _go_on(self, turn: int) -> None:
        """Those that have filled a block get another one, or end."""
        going: list[Running] = []
        ended: list[Running] = []
        for request in self.running[turn]:
            (going if request.left > 0 else ended).append(request)
        if going:
            fresh = self._get(len(going))
            if fresh is None:
                self.refused += len(going)
                ended += going
                going = []
            else:
                for request, block in zip(going, fresh, strict=True):
                    request.blocks.append(block)
                    request.left -= 1
        self.running[turn] = going
        for request in ended:
            self._end(request)

    def _admit(self, turn: int, row: Arrival) -> None:
        blocks = self._get(max(1, ceil_div(row.prompt_tokens, BLOCK_TOKENS)))
        if blocks is None:
            self.refused += 1
            return
        whole = ceil_div(row.prompt_tokens + row.output_tokens, BLOCK_TOKENS)
        self.running[turn].append(Running(whole - len(blocks), blocks))

    def _get(self, count: int) -> list[int] | None:
        if count > self.pool.blocks.free_blocks:
            self.pool.prefer_growth(count)
            if not self.pool.ensure(count):
                self.account.set_demand(0)  # it is not asked for again
                return None
        return self.pool.blocks.alloc(count)

    def _end(self, request: Running) -> None:
        """As vLLM does it: the last block first, so that a prefix is evicted from its end."""
        self.finished += 1
        blocks = request.blocks[::-1]
        if not self._cached:
            self.pool.blocks.free(blocks)
            return
        self.pool.blocks.free(blocks[:1])
        self.pool.blocks.free(blocks[1:], cached=True)

    def _carry(self) -> None:
        commands = self.pool.take_commands()
        if commands is None:
            return
        if commands.unmap:
            self._member.released(len(commands.unmap) * self.page_bytes)
        fresh = len({*commands.map, *commands.ahead} - self._ahead)
        self._member.created(fresh * self.page_bytes)
        self.mapped_pages += fresh
        self._ahead = (self._ahead | {*commands.ahead}) - {*commands.map, *commands.unmap}

    def close(self) -> None:
        """Ends the instance: the ledger takes everything back."""
        self._member.close()
        self.account.close()
