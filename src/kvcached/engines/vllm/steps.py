"""The blocks that a step brings in, as the versions of vLLM write them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def new_blocks(scheduler_output: Any) -> Iterator[int]:
    """Block ids of a ``SchedulerOutput`` (vLLM 0.13 and newer), of all groups."""
    for request in scheduler_output.scheduled_new_reqs:
        for group in request.block_ids:
            yield from group
    for groups in scheduler_output.scheduled_cached_reqs.new_block_ids:
        for group in groups or ():
            yield from group


def new_blocks_0_8(scheduler_output: Any) -> Iterator[int]:
    """The same of vLLM 0.8, which has one group."""
    for request in scheduler_output.scheduled_new_reqs:
        yield from request.block_ids
    for request in scheduler_output.scheduled_cached_reqs:
        yield from request.new_block_ids
