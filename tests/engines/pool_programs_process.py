"""Random programs on vLLM's real BlockPool, plain and elastic side by side: the plain one is the
oracle (``python pool_programs_process.py SEEDS``). vLLM 0.13 and newer; run by
test_pool_programs.py. Of vLLM 0.8, classes_0_8_process.py does the same.

What is said to be cached must also be there: each block's memory carries the hash that it stands
for, and is read at every hit.
"""

from __future__ import annotations

import ctypes
import hashlib
import inspect
import json
import os
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from played_steps import take_step
from vllm.v1.core.block_pool import BlockPool

from kvcached.cache import PageMapper
from kvcached.engines.vllm.pool import ElasticBlockPool
from kvcached.layout import BlockLayout
from kvcached.ledger import Ledger
from kvcached.pages import PagePool
from kvcached.vmm_ops import Blocks, host_backend

TOKENS, PER_PAGE, BLOCK_BYTES = 16, 4, 4096
BLOCKS = 160
STEPS = 300
HASH_BYTES = 32

# vLLM 0.13 is handed the blocks of all groups, newer ones those of one at a time.
TOUCHES_GROUPS = "tuple" in str(inspect.signature(BlockPool.touch).parameters["blocks"].annotation)


class Request:
    """What a pool asks of a request: the hashes of its blocks, each of all before it too."""

    def __init__(self, root: list[int], length: int, tail: int) -> None:
        self.block_hashes: list[bytes] = []
        parent = b""
        for number in range(length):
            word = root[number] if number < len(root) and number < tail else hash((tail, number))
            parent = hashlib.sha256(parent + str(word).encode()).digest()
            self.block_hashes.append(parent)
        self.all_token_ids: list[int] = []
        self.lora_request = None


class Plain:
    """vLLM's own pool, and what a manager does with one."""

    def __init__(self, caching: bool) -> None:
        self.pool: Any = self.make(caching)
        self.held: dict[str, list[Any]] = {}
        self.evicted = False
        evict = self.pool._maybe_evict_cached_block

        def noted(block: Any) -> bool:
            gone: bool = evict(block)
            self.evicted = self.evicted or gone
            return gone

        self.pool._maybe_evict_cached_block = noted

    def make(self, caching: bool) -> Any:
        return BlockPool(BLOCKS, caching, TOKENS)

    def hits(self, request: Request) -> list[Any]:
        found = []
        for each in request.block_hashes[:-1]:  # the last one is computed in any case
            blocks = self.pool.get_cached_block(each, [0])
            if blocks is None:
                break
            found += blocks
        return found

    def has_room(self, hits: list[Any], fresh: int) -> bool:
        unused = sum(block.ref_cnt == 0 for block in hits)
        return bool(fresh + unused <= self.pool.get_num_free_blocks())

    def admit(self, name: str, request: Request) -> tuple[int, bool]:
        """How many blocks are answered from the cache, and whether there is room."""
        hits = self.hits(request)
        fresh = len(request.block_hashes) - len(hits)
        if not self.has_room(hits, fresh):
            return len(hits), False
        self.pool.touch((hits,) if TOUCHES_GROUPS else hits)
        blocks = hits + self.pool.get_new_blocks(fresh)
        self.held[name] = blocks
        self.fill(request, blocks, len(hits), len(blocks) - 1)
        return len(hits), True

    def fill(self, request: Request, blocks: list[Any], cached: int, full: int) -> None:
        if self.pool.enable_caching:
            self.pool.cache_full_blocks(request, blocks, cached, full, TOKENS, 0)

    def append(self, name: str) -> bool:
        if not self.has_room([], 1):
            return False
        self.held[name] += self.pool.get_new_blocks(1)
        return True

    def free(self, name: str) -> None:
        self.pool.free_blocks(reversed(self.held.pop(name)))

    def reset(self) -> bool:
        return bool(self.pool.reset_prefix_cache())


class Elastic(Plain):
    """The pool that the adapter installs, on a real ledger and real host memory."""

    def __init__(self, folder: str, caching: bool, capacity_pages: int) -> None:
        super().__init__(caching)
        layout = BlockLayout.layer_outermost(BLOCKS, [BLOCK_BYTES], PER_PAGE, 4096)
        page = layout.page_bytes
        self.ledger = Ledger.open(Path(folder), "host:programs", capacity_pages * page)
        backend = host_backend(f"programs-{os.getpid()}", self.ledger.lock_fd)
        member = self.ledger.attach("a" * 32, "programs", page)
        self.mapper = PageMapper(self.ledger, member, backend, layout, map_timeout_s=1.0)
        self.account = self.ledger.join("a" * 32, "programs", page)
        self.pages = PagePool(
            Blocks(BLOCKS, PER_PAGE),
            self.account,
            page,
            warm_low=1,
            warm_high=2,
            on_evict=self.pool.forget,
        )
        self.pool.bind(self.pages)
        self.contents: dict[int, bytes] = {}  # by block: the hash that its memory stands for

    def make(self, caching: bool) -> Any:
        return ElasticBlockPool(BLOCKS, caching, TOKENS)

    def has_room(self, hits: list[Any], fresh: int) -> bool:
        if super().has_room(hits, fresh):
            return True
        unused = sum(block.ref_cnt == 0 for block in hits)
        return self.pages.ensure(fresh + unused) and super().has_room(hits, fresh)

    def address(self, block: Any) -> int:
        return int(self.mapper.arena.address) + int(block.block_id) * BLOCK_BYTES

    def hits(self, request: Request) -> list[Any]:
        found = super().hits(request)
        for block, wanted in zip(found, request.block_hashes, strict=False):
            assert self.contents.get(block.block_id) == wanted, "a hit on another's block"
            assert self.pages.blocks.is_present(block.block_id // PER_PAGE)
            assert ctypes.string_at(self.address(block), HASH_BYTES) == wanted, "contents are lost"
        return found

    def fill(self, request: Request, blocks: list[Any], cached: int, full: int) -> None:
        self.step()
        for block in blocks[cached:]:
            self.contents.pop(block.block_id, None)
            ctypes.memset(self.address(block), 0, BLOCK_BYTES)  # it is mapped
        for block, each in zip(blocks[cached:full], request.block_hashes[cached:], strict=False):
            self.contents[block.block_id] = each
            ctypes.memmove(self.address(block), each, HASH_BYTES)
        super().fill(request, blocks, cached, full)

    def append(self, name: str) -> bool:
        done = super().append(name)
        if done:
            self.step()
            block = self.held[name][-1]
            self.contents.pop(block.block_id, None)
            ctypes.memset(self.address(block), 0, BLOCK_BYTES)
        return done

    def step(self) -> None:
        take_step(self.pages, self.mapper)

    def check(self) -> None:
        self.pages.check()
        self.mapper.core.check()
        core, null = self.pages.blocks, self.pool.null_block
        held: Counter[int] = Counter()
        for blocks in self.held.values():
            held.update(block.block_id for block in blocks)
        assert null.block_id not in held
        for block in self.pool.blocks[1:]:
            assert block.ref_cnt == held[block.block_id], "reference counts"
        assert core.used_blocks - 1 == len(held)
        for block_id in held:
            assert self.mapper.arena.is_mapped(block_id // PER_PAGE)
        assert self.ledger.snapshot().charge <= self.ledger.capacity
        assert self.account.charge() >= self.mapper.arena.created_bytes()

    def close(self) -> None:
        self.mapper.close()
        self.account.close()
        self.ledger.close()


class Program:
    """One random program on both. Both hold the same requests at all times: what one refuses the
    other gives up.
    """

    def __init__(self, seed: int, folder: str) -> None:
        self.dice = dice = random.Random(seed)
        self.caching, self.roomy = dice.random() < 0.8, dice.random() < 0.5
        capacity = BLOCKS // PER_PAGE if self.roomy else dice.randrange(6, 36)
        self.plain = Plain(self.caching)
        self.ours = Elastic(folder, self.caching, capacity)
        self.roots = [[dice.randrange(900) for _ in range(40)] for _ in range(3)]
        self.requests: dict[str, Request] = {}
        self.waiting: list[Request] = []  # preempted
        self.apart = False  # one has evicted, or has had a request that the other refused
        self.counts: Counter[str] = Counter()

    def run(self) -> Counter[str]:
        for number in range(STEPS):
            action = self.dice.choices(
                [self.admit, self.append, self.free, self.preempt, self.resume, self.reclaim,
                 self.reset],
                [30, 30, 18, 6, 6, 4, 2],
            )[0]  # fmt: skip
            action(str(number))
            self.apart = self.apart or self.plain.evicted or self.ours.evicted
            self.ours.step()
            self.ours.check()
            self.check_free()
        for name in list(self.requests):
            self.drop(name)
        assert self.ours.reset() and self.plain.reset()
        self.ours.step()
        assert self.ours.pages.blocks.used_blocks == 1, "the null block"
        self.ours.close()
        return self.counts

    def admit(self, name: str, request: Request | None = None) -> None:
        if request is None:
            root = self.dice.choice(self.roots)
            length = self.dice.randrange(2, 40)
            request = Request(root, length, self.dice.randrange(length))
        hits, had = zip(*(pool.admit(name, request) for pool in self.both()), strict=True)
        if not self.apart:
            assert hits[0] == hits[1], f"prefix hits {hits}"
        self.counts["hits"] += hits[1] > 0
        if self.agreed(name, had):
            self.requests[name] = request
        else:
            for pool, there in zip(self.both(), had, strict=True):
                if there:
                    pool.free(name)

    def append(self, _: str) -> None:
        if not self.requests:
            return
        name = self.dice.choice(list(self.requests))
        if not self.agreed(name, tuple(pool.append(name) for pool in self.both())):
            self.drop(name)

    def agreed(self, name: str, had: tuple[bool, ...]) -> bool:
        """Whether both have room. Where there is memory for all blocks they must say the same."""
        plain, ours = had
        self.counts["admitted" if plain and ours else "refused"] += 1
        if self.roomy:
            assert plain == ours or self.apart, f"room for {name}: {had}"
            if plain and ours:
                sizes = [len(pool.held[name]) for pool in self.both()]
                assert sizes[0] == sizes[1], "as many blocks"
        elif plain and not ours:
            self.counts["short of memory"] += 1
        self.apart = self.apart or plain != ours
        return plain and ours

    def free(self, _: str) -> None:
        if self.requests:
            self.drop(self.dice.choice(list(self.requests)))

    def preempt(self, _: str) -> None:
        if self.requests:
            name = self.dice.choice(list(self.requests))
            self.waiting.append(self.requests[name])
            self.drop(name)
            self.counts["preempted"] += 1

    def resume(self, name: str) -> None:
        if self.waiting:
            self.admit(name, self.waiting.pop())

    def drop(self, name: str) -> None:
        del self.requests[name]
        for pool in self.both():
            pool.free(name)

    def reclaim(self, _: str) -> None:
        """Others take memory back: warm pages, then whole pages of cached blocks."""
        before = self.ours.pages.counters.evicted_blocks
        self.counts["pages taken back"] += self.ours.pages.give_up(self.dice.randrange(1, 6))
        self.counts["blocks evicted"] += self.ours.pages.counters.evicted_blocks - before

    def reset(self, _: str) -> None:
        done = [pool.reset() for pool in self.both()]
        assert done[0] == done[1] == (not self.requests), "the same answer to a reset"
        self.counts["resets"] += done[0]
        if done[0]:
            self.apart = self.plain.evicted = self.ours.evicted = False
            self.ours.contents.clear()

    def check_free(self) -> None:
        """The plain pool is as large as ours can become: what is in use is the same in both."""
        used = [len({b.block_id for held in p.held.values() for b in held}) for p in self.both()]
        if not self.apart:
            assert used[0] == used[1], f"blocks in use: {used}"
        assert used[0] == BLOCKS - 1 - self.plain.pool.get_num_free_blocks()

    def both(self) -> tuple[Plain, Elastic]:
        return self.plain, self.ours


def main() -> None:
    total: Counter[str] = Counter()
    for seed in range(int(sys.argv[1])):
        with tempfile.TemporaryDirectory() as folder:
            try:
                total.update(Program(seed, folder).run())
            except AssertionError as error:
                raise AssertionError(f"seed {seed}: {error}") from error
    total["steps"] = STEPS * int(sys.argv[1])
    print(json.dumps(total))


if __name__ == "__main__":
    main()
