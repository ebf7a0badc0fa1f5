"""Random programs on vLLM 0.8.4's real KVCacheManager and BlockPool, plain and elastic side by side
(``python classes_0_8_process.py SEEDS``): the plain one is the oracle. Run by test_vllm_0_8.py.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from played_steps import take_step
from vllm.sampling_params import SamplingParams
from vllm.v1.core import kv_cache_manager
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request, RequestStatus

from kvcached.cache import PageMapper
from kvcached.engines.base import substituted
from kvcached.engines.vllm import scheduling_0_8
from kvcached.engines.vllm.pool import ElasticBlockPool, ElasticKVCacheManager
from kvcached.layout import BlockLayout
from kvcached.ledger import Ledger
from kvcached.pages import PagePool
from kvcached.vmm_ops import Blocks, host_backend

TOKENS, PER_PAGE, BLOCK_BYTES = 16, 4, 4096
BLOCKS = 200
WINDOW = 96


def cache_config(window: bool) -> KVCacheConfig:
    shape = {"block_size": TOKENS, "num_kv_heads": 1, "head_size": 32, "dtype": torch.float32}
    spec = (
        SlidingWindowSpec(**shape, use_mla=False, sliding_window=WINDOW)
        if window
        else FullAttentionSpec(**shape, use_mla=False)
    )
    return KVCacheConfig(BLOCKS, {}, [KVCacheGroupSpec(["layer"], spec)])


class Elastic:
    """An elastic manager over a real ledger and real host memory."""

    def __init__(self, folder: str, caching: bool, window: bool, capacity_pages: int) -> None:
        layout = BlockLayout.layer_outermost(BLOCKS, [BLOCK_BYTES], PER_PAGE, 4096)
        page = layout.page_bytes
        self.ledger = Ledger.open(Path(folder), "host:classes", capacity_pages * page)
        backend = host_backend(f"classes-{os.getpid()}", self.ledger.lock_fd)
        member = self.ledger.attach("a" * 32, "classes", page)
        self.mapper = PageMapper(self.ledger, member, backend, layout, map_timeout_s=1.0)
        account = self.ledger.join("a" * 32, "classes", page)
        with substituted(kv_cache_manager, BlockPool=ElasticBlockPool):
            self.manager = ElasticKVCacheManager(cache_config(window), 2048, caching)
        pool = self.manager.block_pool
        self.pages = PagePool(
            Blocks(BLOCKS, PER_PAGE), account, page, warm_low=1, warm_high=2, on_evict=pool.forget
        )
        pool.bind(self.pages)
        self.manager.this_version = scheduling_0_8
        self.manager.on_refusal = lambda request, needed: False
        self.manager.on_shortage = lambda request, needed: None

    def step(self) -> None:
        take_step(self.pages, self.mapper)


def request(name: str, tokens: list[int]) -> Request:
    return Request(
        request_id=name,
        prompt=None,
        prompt_token_ids=tokens,
        multi_modal_inputs=None,
        multi_modal_hashes=None,
        multi_modal_placeholders=None,
        sampling_params=SamplingParams(max_tokens=500),
        eos_token_id=None,
        arrival_time=0.0,
        lora_request=None,
    )


class Program:
    """One random program on both managers. Both hold the same requests at all times: what one
    refuses the other gives up.
    """

    def __init__(self, seed: int, folder: str) -> None:
        self.chance = chance = random.Random(seed)
        self.caching, self.window = chance.random() < 0.7, chance.random() < 0.25
        self.roomy = chance.random() < 0.5
        capacity = BLOCKS // PER_PAGE if self.roomy else chance.randrange(8, 40)
        self.plain = KVCacheManager(cache_config(self.window), 2048, self.caching)
        self.ours = Elastic(folder, self.caching, self.window, capacity)
        self.managers = (self.plain, self.ours.manager)
        for manager in self.managers:
            self.note_evictions(manager.block_pool)
        if chance.random() < 0.7:
            for manager in self.managers:
                manager.num_preallocate_blocks = 0
        self.exact = self.roomy and self.plain.num_preallocate_blocks == 0
        self.live: dict[str, tuple[Request, Request]] = {}
        self.roots = [[chance.randrange(900) for _ in range(600)] for _ in range(3)]
        # Something was evicted in one of them, or one has had a request that the other refused:
        # from then on prefix hits may differ.
        self.parted = False
        self.lost = 0  # cached blocks, so far
        self.counts: Counter[str] = Counter()

    def run(self, steps: int) -> dict[str, int]:
        for number in range(steps):
            action = self.chance.choices(
                [self.admit, self.append, self.free, self.reclaim, self.reset, self.preempt],
                [30, 45, 15, 3, 2, 5],
            )[0]
            action(str(number))
            self.check_growth(reclaimed=action == self.reclaim)
            self.ours.step()
            self.check()
        for name in list(self.live):
            self.free(name, name)
        self.reset("")
        self.ours.step()
        assert self.ours.pages.blocks.used_blocks == 1, "the null block"
        return self.counts

    def note_evictions(self, pool: Any) -> None:
        evict = pool._maybe_evict_cached_block

        def noted(block: Any) -> bool:
            gone: bool = evict(block)
            self.parted = self.parted or gone
            return gone

        pool._maybe_evict_cached_block = noted

    def admit(self, name: str) -> None:
        root = self.chance.choice(self.roots)[: self.chance.randrange(600)]
        tokens = root + [self.chance.randrange(900) for _ in range(self.chance.randrange(1, 90))]
        pair = request(name, tokens), request(name, list(tokens))
        found = [m.get_computed_blocks(r) for m, r in zip(self.managers, pair, strict=True)]
        self.check_hits(pair[1], found[1][0])
        if not self.parted:
            assert found[0][1] == found[1][1], "the same prefix hits"
        self.counts["hits"] += found[1][1] > 0
        slots = [
            m.allocate_slots(r, r.num_tokens - n, blocks)
            for m, r, (blocks, n) in zip(self.managers, pair, found, strict=True)
        ]
        if self.agreed(slots):
            for each, (_, hit) in zip(pair, found, strict=True):
                each.status, each.num_computed_tokens = RequestStatus.RUNNING, hit
                each.num_computed_tokens = each.num_tokens
            self.live[name] = pair
        else:
            self.give_up(pair, slots)

    def append(self, _: str) -> None:
        if not self.live:
            return
        name = self.chance.choice(list(self.live))
        pair = self.live[name]
        for each in pair:
            each.append_output_token_ids(7)
        slots = [m.allocate_slots(r, 1) for m, r in zip(self.managers, pair, strict=True)]
        if self.agreed(slots):
            for each in pair:
                each.num_computed_tokens = each.num_tokens
        else:
            del self.live[name]
            self.give_up(pair, slots)

    def agreed(self, slots: list[Any]) -> bool:
        """Whether both have room; where both could have, they must say the same."""
        plain, ours = (each is not None for each in slots)
        self.counts["admitted" if plain and ours else "refused"] += 1
        if self.exact and not self.parted:
            assert plain == ours, "the same admission"
            if plain:
                assert len(slots[0]) == len(slots[1]), "as many blocks"
        if ours and not plain:
            assert self.parted or not self.exact
        if not ours and plain:
            self.counts["short of memory"] += 1
            assert not self.roomy or self.parted or not self.exact
        self.parted = self.parted or plain != ours
        return plain and ours

    def give_up(self, pair: tuple[Request, Request], slots: list[Any]) -> None:
        """Frees a request in both; a scheduler would free what was refused on preemption."""
        for manager, each in zip(self.managers, pair, strict=True):
            manager.free(each)
            manager.free_block_hashes(each)

    def free(self, _: str, name: str | None = None) -> None:
        if self.live:
            pair = self.live.pop(name or self.chance.choice(list(self.live)))
            self.give_up(pair, [])

    def preempt(self, name: str) -> None:
        """A running request loses its blocks and comes back with all its tokens."""
        if not self.live:
            return
        old = self.chance.choice(list(self.live))
        pair = self.live.pop(old)
        for manager, each in zip(self.managers, pair, strict=True):
            manager.free(each)
            each.status, each.num_computed_tokens = RequestStatus.PREEMPTED, 0
        found = [m.get_computed_blocks(r) for m, r in zip(self.managers, pair, strict=True)]
        self.check_hits(pair[1], found[1][0])
        slots = [
            m.allocate_slots(r, r.num_tokens - n, blocks)
            for m, r, (blocks, n) in zip(self.managers, pair, found, strict=True)
        ]
        self.counts["preempted"] += 1
        if self.agreed(slots):
            for each in pair:
                each.status, each.num_computed_tokens = RequestStatus.RUNNING, each.num_tokens
            self.live[old] = pair
        else:
            self.give_up(pair, slots)

    def reclaim(self, _: str) -> None:
        """Others take memory back: warm pages, then whole pages of cached blocks."""
        before = self.ours.pages.counters.evicted_blocks
        given = self.ours.pages.give_up(self.chance.randrange(1, 6))
        self.counts["pages taken back"] += given
        self.counts["blocks evicted"] += self.ours.pages.counters.evicted_blocks - before

    def reset(self, _: str) -> None:
        done = [manager.reset_prefix_cache() for manager in self.managers]
        assert done[0] == done[1] == (not self.live), "the same answer to a reset"
        self.counts["resets"] += done[0]
        if done[0]:
            self.parted = False

    def check_hits(self, given: Request, blocks: list[Any]) -> None:
        """What is said to be cached is what the request's own hashes name, on a present page."""
        manager = self.ours.manager
        null = manager.block_pool.null_block
        hashes = manager.req_to_block_hashes[given.request_id]
        for block, wanted in zip(blocks, hashes, strict=False):
            if block is not null:
                assert block.block_hash == wanted
                assert self.ours.pages.blocks.is_present(block.block_id // PER_PAGE)

    def check_growth(self, reclaimed: bool) -> None:
        """With memory for all pages, no allocation takes a cached block before all are there."""
        core = self.ours.pages.blocks
        lost, self.lost = core.evictions - self.lost, core.evictions
        assert not lost or reclaimed or not self.roomy or core.present_pages == core.num_pages

    def check(self) -> None:
        self.ours.pages.check()
        core, null = self.ours.pages.blocks, self.ours.manager.block_pool.null_block
        held: Counter[int] = Counter()
        for blocks in self.ours.manager.req_to_blocks.values():
            held.update(block.block_id for block in blocks if block is not null)
        for block in self.ours.manager.block_pool.blocks[1:]:
            assert block.ref_cnt == held[block.block_id], "reference counts"
        assert core.used_blocks - 1 == len(held)
        for block_id in held:
            page = block_id // PER_PAGE
            assert core.is_present(page) and self.ours.mapper.arena.is_mapped(page)
        for hashed in self.ours.manager.block_pool.cached_block_hash_to_block.values():
            for block_id in hashed:
                assert core.is_present(block_id // PER_PAGE), "a cached block without memory"
        charge = self.ours.ledger.snapshot().charge
        assert charge <= self.ours.ledger.capacity


def main() -> None:
    total: Counter[str] = Counter()
    for seed in range(int(sys.argv[1])):
        with tempfile.TemporaryDirectory() as folder:
            program = Program(seed, folder)
            try:
                total.update(program.run(250))
            except AssertionError as error:
                raise AssertionError(f"seed {seed}: {error}") from error
            program.ours.mapper.close()
            program.ours.ledger.close()
    print(json.dumps(total))


if __name__ == "__main__":
    main()
