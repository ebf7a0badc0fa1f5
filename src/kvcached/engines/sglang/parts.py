"""What the adapters of all versions of SGLang have in common: the seams of its scheduling."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder
from sglang.srt.managers.scheduler import Scheduler

from kvcached.config import Config
from kvcached.engines.base import Seam
from kvcached.engines.sglang import admission, build, steps
from kvcached.engines.sglang.allocators import (
    ElasticPagedAllocator,
    ElasticTokenAllocator,
    elastic,
)
from kvcached.errors import EngineError

TOGETHER = frozenset({"torch_native"})
"""Attention backends that were seen to be right where all layers of a slot lie together."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a version calls things, as functions of its own objects."""

    extend_tokens: Callable[[Any], int]
    """Tokens of a request in line that are to be computed."""
    chunk_left: Callable[[Any], int]
    """Tokens of the prompt that the scheduler takes in pieces that are still to come."""
    decode_blocks: Callable[..., int]
    """Blocks for the next token of each request of a batch."""
    release_last: Callable[..., Any]
    """Releases the only request of a batch, and returns it."""
    retracted: Callable[[list[Any]], Any]
    """The answer of a retraction that took back these requests."""
    batch_of: Callable[[Any], Any] = lambda answer: answer
    """The batch in what the scheduler decided to run."""


def scheduling(config: Config, parts: Parts) -> Sequence[Seam]:
    """The seams of admission, retraction and steps."""
    adding = admission.wrap_add_one_req(parts.extend_tokens, AddReqResult.NO_TOKEN)
    retracting = admission.wrap_retract_decode(
        parts.decode_blocks, parts.release_last, parts.retracted
    )
    batch = steps.wrap_get_next_batch(parts.batch_of, parts.chunk_left)
    return (
        Seam(PrefillAdder, "add_one_req", adding),
        Seam(
            ScheduleBatch, "check_decode_mem", admission.wrap_check_decode_mem(parts.decode_blocks)
        ),
        Seam(ScheduleBatch, "retract_decode", retracting),
        Seam(Scheduler, "__init__", steps.wrap_init(config)),
        Seam(Scheduler, "get_next_batch_to_run", batch),
        Seam(Scheduler, "run_batch", steps.wrap_run_batch),
        Seam(Scheduler, "process_batch_result", steps.wrap_process_batch_result),
    )


def allocators(module: Any, free_slots: str = "free_pages") -> Sequence[Seam]:
    """Both allocator classes, under the names by which a module builds them."""
    tokens = functools.partial(elastic, ElasticTokenAllocator, free_list=free_slots)
    return (
        Seam(module, "TokenToKVPoolAllocator", tokens),
        Seam(
            module,
            "PagedTokenToKVPoolAllocator",
            functools.partial(elastic, ElasticPagedAllocator),
        ),
    )


class TreeCache:
    """``slots.PrefixCache`` over SGLang's tree of prefixes, or what stands in its place without."""

    EVICTING: ClassVar[Sequence[str]] = ("evict",)
    """The tree's methods that evict; they may call each other."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.tree = scheduler.tree_cache
        self.evicted_tokens = 0
        for name in self.EVICTING:
            setattr(self.tree, name, self._counting(getattr(self.tree, name)))

    def _counting(self, evict: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(evict)
        def counting(*args: Any, **kwargs: Any) -> Any:
            counted, before = self.evicted_tokens, self.evictable_tokens()
            result = evict(*args, **kwargs)
            # Not added to what calls inside of this one have counted.
            self.evicted_tokens = counted + before - self.evictable_tokens()
            return result

        return counting

    def evictable_tokens(self) -> int:
        return int(self.tree.evictable_size() or 0)  # without a tree some versions say None

    def rows(self) -> Iterator[tuple[Any, torch.Tensor]]:
        """The requests that may hold slots, and the table of slots by request."""
        table = self.scheduler.req_to_token_pool.req_to_token
        for req in steps.requests_under_way(self.scheduler):
            yield req, table


def virtual_bytes(original: Any) -> Any:
    """``_profile_available_bytes``: addresses, not what is free."""

    @functools.wraps(original)
    def _profile_available_bytes(self: Any, pre_model_load_memory: int) -> int:
        if self.mambaish_config is not None:
            raise EngineError("kvcached does not support models with Mamba layers in SGLang yet")
        return build.current().virtual_bytes

    return _profile_available_bytes
