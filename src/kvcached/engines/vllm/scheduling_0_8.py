"""The same of vLLM 0.8: one manager without a coordinator, and no reason to finish but an abort."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vllm.v1.core import kv_cache_manager
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.request import RequestStatus

from kvcached.units import ceil_div

POOL_MADE_IN = kv_cache_manager
"""The module whose name BlockPool vLLM uses where it makes its pool."""
FAILED = RequestStatus.FINISHED_ABORTED


def blocks_needed(
    manager: Any, request: Any, num_new_tokens: int, args: Sequence[Any], kwargs: dict[str, Any]
) -> int:
    """An upper bound of the blocks that a call of ``allocate_slots`` wants: prefix hits count as
    new ones. The blocks that vLLM takes in advance do not count: it takes as many as are free.
    """
    hits = args[0] if args else kwargs.get("new_computed_blocks")
    tokens = (
        request.num_computed_tokens
        + len(hits or ()) * manager.block_size
        + num_new_tokens
        + (args[1] if len(args) > 1 else kwargs.get("num_lookahead_tokens", 0))
    )
    held = len(manager.req_to_blocks.get(request.request_id, ()))
    return int(max(0, ceil_div(tokens, manager.block_size) - held))


def blocks_held(manager: Any, request_id: str) -> int:
    """Blocks that a request holds; outside a sliding window there are none."""
    null = manager.block_pool.null_block
    return sum(block is not null for block in manager.req_to_blocks.get(request_id, ()))


def report_failed(outputs: Any, failed: Iterable[tuple[Any, str]]) -> Any:
    """Adds to a step's outputs that requests have failed, and why: their clients find the reason
    beside what was generated.
    """
    outputs.outputs += [
        EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=[],
            finish_reason=FinishReason.ABORT,
            stop_reason=reason,
        )
        for request, reason in failed
    ]
    return outputs
