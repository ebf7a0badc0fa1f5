"""What the scheduler's half asks of vLLM's bookkeeping (0.13 and newer): the blocks that a request
needs and holds, and how it is told that it has failed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from vllm.v1.core import kv_cache_coordinator
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import RequestStatus

from kvcached.units import ceil_div

POOL_MADE_IN = kv_cache_coordinator
"""The module whose name BlockPool vLLM uses where it makes its pool."""
FAILED = RequestStatus.FINISHED_ERROR


def blocks_needed(
    manager: Any, request: Any, num_new_tokens: int, args: Sequence[Any], kwargs: dict[str, Any]
) -> int:
    """An upper bound of the blocks that a call of ``allocate_slots`` wants: prefix hits count as
    new ones.
    """
    cached_tokens = args[0] if args else kwargs.get("num_new_computed_tokens", 0)
    tokens = (
        request.num_computed_tokens
        + cached_tokens
        + num_new_tokens
        + kwargs.get("num_lookahead_tokens", 0)
        + kwargs.get("num_external_computed_tokens", 0)
    )
    whole = request.num_tokens if kwargs.get("full_sequence_must_fit", False) else 0
    extra = getattr(manager, "watermark_blocks", 0) + int(kwargs.get("reserved_blocks", 0))
    return extra + _missing(manager, request, tokens, whole)


def sequence_blocks_needed(manager: Any, request: Any) -> int:
    """An upper bound of the blocks that the whole of a request wants."""
    return _missing(manager, request, 0, request.num_tokens)


def _missing(manager: Any, request: Any, tokens: int, whole: int) -> int:
    tokens, whole = min(tokens, manager.max_model_len), min(whole, manager.max_model_len)
    needed = 0
    for each in manager.coordinator.single_type_managers:
        held = len(each.req_to_blocks.get(request.request_id, ()))
        in_all = min(ceil_div(whole, each.block_size), _most_at_once(each))
        needed += max(0, max(ceil_div(tokens, each.block_size), int(in_all)) - held)
    return needed


def _most_at_once(manager: Any) -> float:
    """Blocks that a request never holds more of at a time: what lies outside a window is freed."""
    for name in ("max_admission_blocks_per_request", "_max_admission_blocks_per_request"):
        most = getattr(manager, name, None)
        if most is not None:
            return int(most)
    return math.inf


def blocks_held(manager: Any, request_id: str) -> int:
    """Blocks that a request holds; outside a sliding window there are none."""
    return sum(
        not block.is_null
        for each in manager.coordinator.single_type_managers
        for block in each.req_to_blocks.get(request_id, ())
    )


def report_failed(outputs: Any, failed: Iterable[tuple[Any, str]]) -> Any:
    """Adds to a step's outputs that requests have failed, and why: see ``never_fits``."""
    for request, reason in failed:
        batch = outputs.setdefault(request.client_index, EngineCoreOutputs())
        batch.outputs.append(
            EngineCoreOutput(
                request_id=request.request_id,
                new_token_ids=[],
                finish_reason=FinishReason.ERROR,
                stop_reason=reason,
            )
        )
    return outputs
