"""A simulated engine with a prefix cache on a real page pool; see ``kvcached.bench.hits``.

It keeps vLLM's manners: a request's longest cached prefix of whole blocks is taken over, its other
blocks are handed out at once, blocks are cached by the hash of their prefix and freed last first.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from kvcached.ledger import Ledger
from kvcached.pages import PagePool
from kvcached.units import ceil_div
from kvcached.vmm_ops import Blocks

BLOCK_TOKENS = 512
"""Tokens of a block: the trace names its prefixes in blocks of this size."""
BLOCKS_PER_PAGE = 2
BLOCK_BYTES = 1 << 20
PAGE_BYTES = BLOCKS_PER_PAGE * BLOCK_BYTES
TOKENS_PER_S = 40.0
PREFILL_TOKENS_PER_S = 20_000.0
MAX_RUNNING = 256


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request of a trace with the hashes of its prompt's blocks."""

    at_s: float
    tokens: int
    output_tokens: int
    hashes: tuple[int, ...]

    @property
    def whole(self) -> int:
        """Blocks that may be cached: whole ones, and at least one token is always computed."""
        return min(len(self.hashes), (self.tokens - 1) // BLOCK_TOKENS)

    @property
    def blocks(self) -> int:
        """Blocks of its prompt and its output."""
        return ceil_div(self.tokens + self.output_tokens, BLOCK_TOKENS)


class CachingEngine:
    """One instance; one simulated step at a time."""

    def __init__(
        self,
        ledger: Ledger,
        name: str,
        prompts: Sequence[Prompt],
        max_cached_blocks: int | None = None,
    ) -> None:
        self.name = name
        self.waits_s: list[float] = []
        self.prompt_tokens = self.hit_tokens = 0
        self._prompts = prompts
        self._member = ledger.attach(self.name, self.name, PAGE_BYTES)
        if not self._member.pin(PAGE_BYTES):
            raise RuntimeError(f"{self.name}: no memory for its pinned page")
        self.account = ledger.join(self.name, self.name, PAGE_BYTES)
        self.account.describe(BLOCK_BYTES, BLOCK_TOKENS, PAGE_BYTES)
        self._now = 0.0
        pages = ledger.capacity // PAGE_BYTES
        self.pool = PagePool(
            Blocks(pages * BLOCKS_PER_PAGE, BLOCKS_PER_PAGE),
            self.account,
            PAGE_BYTES,
            warm_low=1,
            warm_high=4,
            max_cached_blocks=max_cached_blocks,
            clock=lambda: self._now,
            on_evict=self._forget,
        )
        self.pool.publish()
        self._ahead: set[int] = set()  # pages that were mapped before any use
        self._next = 0
        self._waiting: deque[Prompt] = deque()
        self._ends: list[tuple[float, int, list[int]]] = []  # when, order, blocks
        self._block_of: dict[int, int] = {}  # by hash
        self._hash_of: dict[int, int] = {}  # by block
        self._users: dict[int, int] = {}  # by block that has a hash and is in use

    @property
    def done(self) -> bool:
        """Whether all of its requests have ended."""
        return self._next == len(self._prompts) and not self._waiting and not self._ends

    def due(self, now: float) -> bool:
        """Whether a step would do anything."""
        return bool(
            self._waiting
            or (self._next < len(self._prompts) and self._prompts[self._next].at_s <= now)
            or (self._ends and self._ends[0][0] <= now)
            or self.account.pressed()
        )

    def step(self, now: float) -> None:
        """What an engine does in one step."""
        self._now = now
        self.pool.relieve()
        while self._next < len(self._prompts) and self._prompts[self._next].at_s <= now:
            self._waiting.append(self._prompts[self._next])
            self._next += 1
        while self._ends and self._ends[0][0] <= now:
            self._free(heapq.heappop(self._ends)[2])
        short = not self._admit(now)
        if not short:
            self.account.set_demand(0)
        self.pool.settle(idle=not self._ends)
        self._carry()
        self.pool.publish()

    def _admit(self, now: float) -> bool:
        """Starts waiting requests in their order; False where memory is missing for the next."""
        while self._waiting and len(self._ends) < MAX_RUNNING and not self.pool.closed:
            prompt = self._waiting[0]
            blocks = self._start(prompt)
            if blocks is None:
                self.pool.want(sum(each.blocks for each in self._waiting))
                return False
            self._waiting.popleft()
            self.waits_s.append(now - prompt.at_s)
            ids, hits = blocks
            self.prompt_tokens += prompt.tokens
            self.hit_tokens += hits * BLOCK_TOKENS
            takes_s = (prompt.tokens - hits * BLOCK_TOKENS) / PREFILL_TOKENS_PER_S
            takes_s += prompt.output_tokens / TOKENS_PER_S
            heapq.heappush(self._ends, (now + takes_s, len(self.waits_s), ids))
        return True

    def _start(self, prompt: Prompt) -> tuple[list[int], int] | None:
        """The blocks of a request, and how many of them were cached; None on a shortage."""
        hits = self._prefix(prompt)
        unused = [block for block in hits if block not in self._users]
        fresh = prompt.blocks - len(hits)
        if not self.pool.ensure(fresh + len(unused)):
            return None
        # Growing gave nothing of ours up, so the prefix is still there.
        self.pool.blocks.touch(unused)
        if fresh > self.pool.blocks.free_blocks:
            self.pool.prefer_growth(fresh)
        ids = self.pool.blocks.alloc(fresh) if fresh else []
        assert ids is not None
        self._forget(ids)
        for block, digest in zip(ids, prompt.hashes[len(hits) : prompt.whole], strict=False):
            self._name(block, digest)
        blocks = [*hits, *ids]
        for block in blocks[: prompt.whole]:
            self._users[block] = self._users.get(block, 0) + 1
        return blocks, len(hits)

    def _prefix(self, prompt: Prompt) -> list[int]:
        found = []
        for digest in prompt.hashes[: prompt.whole]:
            block = self._block_of.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def _name(self, block: int, digest: int) -> None:
        before = self._block_of.get(digest)
        if before is not None:  # found only behind a prefix that was lost
            del self._hash_of[before]
        self._block_of[digest] = block
        self._hash_of[block] = digest

    def _forget(self, blocks: Sequence[int]) -> None:
        """Their contents are lost."""
        for block in blocks:
            digest = self._hash_of.pop(block, None)
            if digest is not None:
                del self._block_of[digest]

    def _free(self, blocks: Sequence[int]) -> None:
        kept: list[int] = []
        lost: list[int] = []
        for block in reversed(blocks):
            users = self._users.get(block, 0)
            if users > 1:
                self._users[block] = users - 1
                continue
            self._users.pop(block, None)
            (kept if block in self._hash_of else lost).append(block)
        if lost:
            self.pool.blocks.free(lost)
        if kept:
            self.pool.blocks.free(kept, cached=True)

    def _carry(self) -> None:
        commands = self.pool.take_commands()
        if commands is None:
            return
        if commands.unmap:
            self._member.released(len(commands.unmap) * PAGE_BYTES)
        fresh = len({*commands.map, *commands.ahead} - self._ahead)
        self._member.created(fresh * PAGE_BYTES)
        self._ahead = (self._ahead | {*commands.ahead}) - {*commands.map, *commands.unmap}

    def close(self) -> None:
        """Ends the instance: the ledger takes everything back."""
        self._member.close()
        self.account.close()
