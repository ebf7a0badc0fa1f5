"""SGLang 0.5: what its versions have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from kvcached.engines.sglang import parts
from kvcached.units import ceil_div


def arguments(server_args: Any) -> Mapping[str, Any]:
    """The settings; SGLang completes them while it builds the engine."""
    settings: dict[str, Any] = vars(server_args)
    return settings


class Cache(parts.TreeCache):
    """``slots.PrefixCache``, as far as versions share it."""

    def evict(self, tokens: int) -> None:
        self.tree.evict(EvictParams(num_tokens=tokens))

    def held_slots(self) -> Iterator[torch.Tensor]:
        for req, table in self.rows():
            if req.req_pool_idx is not None:
                yield table[req.req_pool_idx, : req.kv_allocated_len]


def decode_blocks(batch: Any, *args: Any, **kwargs: Any) -> int:
    """Blocks for the next token of each request of a batch."""
    tokens = batch.new_tokens_required_next_decode(*args, **kwargs)
    return ceil_div(tokens, batch.token_to_kv_pool_allocator.page_size)


def release_last(batch: Any, *server_args: Any) -> Any:
    """Releases the only request of a batch, and returns it."""
    (req,) = batch.reqs
    batch.release_req(0, 0, *server_args)
    batch.filter_batch(keep_indices=[])
    return req


def retracted(reqs: list[Any]) -> tuple[list[Any], float, list[Any]]:
    """The answer of a retraction: taken back, the share of tokens to reckon with, given up."""
    return reqs, 1.0, []
