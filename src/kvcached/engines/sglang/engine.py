"""One SGLang engine in its scheduler's process: its blocks, its pages, its steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from kvcached.engines import devices
from kvcached.engines.sglang.buffers import KvMemory
from kvcached.engines.sglang.build import Build
from kvcached.engines.sglang.ranks import AgreedAccount, AgreedClock, FirstRank, together
from kvcached.engines.sglang.slots import PrefixCache, SlotPages, Slots, blocks_for
from kvcached.errors import EngineError
from kvcached.group import grouped
from kvcached.ledger import Account
from kvcached.units import format_size
from kvcached.vmm_ops import Blocks

logger = logging.getLogger(__name__)

# An engine that can only wait sleeps on the ledger; at most so long, for its clients' messages.
WAIT_S = 0.05
# How many of the waiting requests' prompts are part of the demand.
QUEUE_IN_DEMAND = 64
_ATTRIBUTE = "kvcached"


def attach(kv_cache: Any, memory: KvMemory) -> None:
    """Leaves the memory with SGLang's KV cache, where its allocator finds it."""
    setattr(kv_cache, _ATTRIBUTE, memory)


class ElasticEngine:
    """Joins the blocks that SGLang's allocator hands out with the pages under them.

    The scheduler and the worker of an SGLang engine are one process, so commands go straight to
    the mapper, before the step that needs them. Every method runs on the scheduler's thread. With
    several ranks each has one of these, and all decide alike (``ranks``).

    Steps in flight: a step that was launched may still touch slots that were freed since. What it
    uses is known to be done when its result was processed; pages are unmapped only then.
    """

    def __init__(self, memory: KvMemory) -> None:
        build = memory.build
        self.build = build
        self.memory = memory
        page_bytes = memory.layout.page_bytes * build.devices.ranks_each
        self.accounts = _join(memory, page_bytes) if build.number == 0 else []
        """What this process alone schedules for, one a device; empty on all ranks but the first."""
        self.account = _agreed(build, self.accounts, page_bytes)
        self._clock = None if build.rank is None else AgreedClock(build.rank)
        self.pages = SlotPages(
            Blocks(memory.layout.num_blocks, memory.layout.blocks_per_page),
            self.account,
            page_bytes,
            warm_low=build.config.warm_low,
            warm_high=build.config.warm_high,
            preempt=build.config.preempt,
            clock=self._clock or time.monotonic,
            on_evict=lambda _: None,
        )
        self.slots = Slots(self.pages, self.account)
        self._stream = 0
        self._launched = 0
        self._finished = 0
        self._dropped_at = 0  # steps launched when pages were last given up
        self._freed = self.account.freed_seq  # before the last pass of admission

    @staticmethod
    def of(kv_cache: Any, size: int) -> ElasticEngine:
        """The engine of a KV cache, made for its one allocator. Raises EngineError where the KV
        cache is not elastic, or where the allocator has other slots than it.
        """
        memory = getattr(kv_cache, _ATTRIBUTE, None)
        if not isinstance(memory, KvMemory):
            raise EngineError(
                f"kvcached does not support SGLang's KV cache {type(kv_cache).__name__} yet"
            )
        blocks = size // memory.block_tokens + 1
        if blocks != memory.layout.num_blocks:
            raise EngineError(
                f"kvcached: SGLang's allocator has {blocks} blocks, its KV cache "
                f"{memory.layout.num_blocks}"
            )
        return ElasticEngine(memory)

    @property
    def block_tokens(self) -> int:
        return self.memory.block_tokens

    def start(self, cache: PrefixCache, stream: int = 0) -> None:
        """The scheduler is built: the engine serves from now on. Its steps run on ``stream``, as
        ``PageMapper.apply`` has it.
        """
        self.pages.bind(cache, self.block_tokens)
        self._stream = stream
        self.build.measure()
        self.account.set_ready()
        ledgers = self.build.ledgers.values()
        logger.info(
            "kvcached: %s on %s: %d blocks of %s, pages of %s, capacity %s",
            self.build.name,
            ", ".join(ledger.device for ledger in ledgers),
            self.memory.layout.num_blocks,
            format_size(self.memory.block_bytes * self.build.devices.ranks_each),
            format_size(self.pages.page_bytes),
            ", ".join(format_size(ledger.capacity) for ledger in ledgers),
        )

    def most_tokens(self) -> int:
        """The longest sequence that this engine could hold if others kept only what is theirs."""
        return self.slots.most() * self.block_tokens

    # --- a step

    @together
    def begin_step(self) -> None:
        """Before SGLang decides what runs next."""
        if self._clock is not None:
            self._clock.turn()
        self._freed = self.account.freed_seq
        self.slots.short = False
        self.slots.begin_promises()
        if self._may_drop():
            self.pages.relieve()
            self._note_drops()

    @together
    def end_step(self, chunk_left: int, waiting: Sequence[int], runs: bool) -> None:
        """After it. ``chunk_left`` are the tokens of a prompt that is taken in pieces and has more
        to come: memory for them stays set aside. ``waiting`` are lengths of prompts in line, where
        memory was short (``QUEUE_IN_DEMAND`` of them).
        """
        if chunk_left:
            self.slots.secure(blocks_for(chunk_left, self.block_tokens))
            self.slots.release(blocks_for(chunk_left, self.block_tokens))
        else:
            self.slots.release(0)
        if self.slots.short:
            self.pages.want(sum(blocks_for(length, self.block_tokens) for length in waiting))
        else:
            self.account.set_demand(0)
        self.settle(idle=not runs)

    @together
    def launch(self) -> None:
        """Right before a step is launched: its pages are mapped when this returns."""
        self._flush()
        self._launched += 1

    @together
    def finish(self) -> None:
        """The result of the step that was launched first of those in flight was processed."""
        self._finished += 1
        self.settle(idle=False)

    @together
    def idle(self, waits: bool) -> None:
        """Nothing runs and nothing is in flight. ``waits``: requests wait, for memory."""
        self._finished = self._launched
        self._flush()  # what had to wait for the last step
        self.pages.relieve()
        self.settle(idle=not waits)
        self._flush()
        if waits and self.slots.short:
            self.account.wait_freed(self._freed, WAIT_S)

    @together
    def wants_idle(self) -> bool:
        """Whether an engine at rest has something to do. Cheap: asked in each turn of its loop."""
        pages = self.pages
        return (
            pages.has_commands()
            or self.account.pressed()
            or pages.rested()
            or self._finished != self._launched
        )

    def settle(self, idle: bool) -> None:
        """Brings the warm pages to what the engine is about to need, and the cache to its bound."""
        most = self.build.config.max_cached_tokens
        if most >= 0:
            self.pages.evict(self.pages.evictable_blocks() - most // self.block_tokens)
        if self._may_drop():
            self.pages.settle(idle=idle)
            self._note_drops()
        self.pages.publish()

    def _may_drop(self) -> bool:
        """Pages are given up only while none waits to be unmapped: so that each of them has to
        wait for the steps in flight at its own time only.
        """
        return not self.pages.has_unmaps()

    def _note_drops(self) -> None:
        if self.pages.has_unmaps():
            self._dropped_at = self._launched

    def _flush(self) -> None:
        commands = self.pages.take_commands(unmap=self._finished >= self._dropped_at)
        if commands is not None:
            self.memory.mapper.apply(commands, self._stream)
        self.pages.publish()


def _join(memory: KvMemory, page_bytes: int) -> list[Account]:
    """The engine's accounts on all of its devices; the ledgers are told what its pages are."""
    build = memory.build
    ledgers = build.ledgers.values()
    accounts = devices.join(build.config, ledgers, build.instance, build.name, page_bytes)
    block_bytes = memory.block_bytes * build.devices.ranks_each
    for account in accounts:
        account.describe(block_bytes, memory.block_tokens, page_bytes)
    return accounts


def _agreed(build: Build, accounts: Sequence[Account], page_bytes: int) -> Account | AgreedAccount:
    """What the engine asks: its account, or that of all of its ranks."""
    if build.rank is None:
        return accounts[0]
    if isinstance(build.rank, FirstRank):
        build.rank.accounts = grouped(accounts, page_bytes)
    return AgreedAccount(build.rank)
