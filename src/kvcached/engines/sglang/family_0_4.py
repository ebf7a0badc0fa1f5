"""SGLang 0.4: what its versions have in common."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.mem_cache.chunk_cache import ChunkCache
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.model_executor import model_runner

from kvcached.config import Config
from kvcached.engines.base import Seam, substituted
from kvcached.engines.sglang import admission, build, kv_pools, parts, steps


def arguments(server_args: Any) -> Mapping[str, Any]:
    """The settings; SGLang completes them while it builds the engine."""
    settings: dict[str, Any] = vars(server_args)
    return settings


class Cache(parts.TreeCache):
    """See ``slots.PrefixCache``."""

    def evict(self, tokens: int) -> None:
        self.tree.evict(tokens)

    def held_slots(self) -> Iterator[torch.Tensor]:
        for req, table in self.rows():
            if req.req_pool_idx is not None:
                # A step may be under way that has taken a slot more.
                yield table[req.req_pool_idx, : admission.length(req) + 1]


def _chunk_left(scheduler: Any) -> int:
    req = scheduler.chunked_req
    return 0 if req is None else admission.length(req) - len(req.fill_ids)


def _decode_blocks(batch: Any, *_: Any) -> int:
    """A request whose slots fill their blocks needs another."""
    return int((batch.seq_lens % batch.token_to_kv_pool_allocator.page_size == 0).sum())


def _release_last(batch: Any, *_: Any) -> Any:
    """What SGLang does with every other request that it retracts."""
    (req,) = batch.reqs
    if isinstance(batch.tree_cache, ChunkCache):
        first = 0
    else:
        page = batch.token_to_kv_pool_allocator.page_size
        first = len(req.prefix_indices) // page * page
        batch.tree_cache.dec_lock_ref(req.last_node)
    end = int(batch.seq_lens[0])
    rows = batch.req_to_token_pool.req_to_token
    batch.token_to_kv_pool_allocator.free(rows[req.req_pool_idx, first:end])
    batch.req_to_token_pool.free(req.req_pool_idx)
    req.reset_for_retract()
    batch.filter_batch(keep_indices=[])
    return req


def _max_num_token(original: Any) -> Any:
    """SGLang computes the number of slots from the memory that it finds free."""

    @functools.wraps(original)
    def profile_max_num_token(self: Any, total_gpu_memory: int) -> int:
        free_gib = build.current().virtual_bytes / (1 << 30)
        with substituted(model_runner, get_available_gpu_memory=lambda *_, **__: free_gib):
            slots: int = original(self, 0)
        return slots

    return profile_max_num_token


_PARTS = parts.Parts(
    extend_tokens=lambda req: int(req.extend_input_len),
    chunk_left=_chunk_left,
    decode_blocks=_decode_blocks,
    release_last=_release_last,
    retracted=lambda reqs: (reqs, 1.0),
)


def seams(config: Config, counting: Sequence[str], free_slots: str) -> Sequence[Seam]:
    """Everything that is replaced in SGLang's own code; the rest are subclasses.

    ``counting`` are the scheduler's methods that make statistics, ``free_slots`` the attribute of
    the allocator of single slots that lists the free ones.
    """
    return (
        Seam(MHATokenToKVPool, "_create_buffers", kv_pools.answer_mha_zeros),
        Seam(MLATokenToKVPool, "__init__", kv_pools.answer_mla_zeros),
        Seam(model_runner.ModelRunner, "profile_max_num_token", _max_num_token),
        *parts.allocators(model_runner, free_slots),
        *parts.scheduling(config, _PARTS),
        Seam(ScheduleBatch, "prepare_for_decode", admission.skip_when_empty),
        Seam(Scheduler, "check_memory", steps.wrap_idle),
        *(Seam(Scheduler, name, steps.counting) for name in counting),
    )
