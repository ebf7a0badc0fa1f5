"""Requests that can never fit: what their clients are told, and the way there.

A prompt that is too large is refused in the front end (``front.check_request``). One that outgrows
what its instance can get, or whose limit was lowered meanwhile, is ended by the scheduler: its last
output carries the reason (``stop_reason``) to the front end, where vLLM itself has only "Internal
server error" for it. A caller of the in-process ``LLM`` finds it in the output.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from vllm.v1.engine import FinishReason

from kvcached.errors import RequestTooLargeError
from kvcached.units import format_size

try:
    from vllm.exceptions import VLLMValidationError

    _BASES: tuple[type, ...] = (VLLMValidationError, RequestTooLargeError)  # the first one's init
except ImportError:  # before vLLM 0.16
    _BASES = (RequestTooLargeError,)


class RequestNeverFitsError(*_BASES):  # type: ignore[misc]
    """vLLM answers its own validation errors with HTTP 400 (where it has none, all of them that are
    a ValueError), and others with 500.
    """


def reason(tokens: str, blocks: int, name: str, most: int, block: tuple[int, int]) -> str:
    """Both numbers in a sentence: the blocks that a request of so many ``tokens`` (in words) needs,
    and the ``most`` that the instance ``name`` can get. ``block`` is a block's tokens and bytes.
    """
    block_tokens, block_bytes = block
    return (
        f"This request needs {blocks} blocks of KV cache ({tokens}, "
        f"{format_size(blocks * block_bytes)}), but {name} can get at most {most} blocks "
        f"({most * block_tokens} tokens, {format_size(most * block_bytes)})."
    )


def answer(processor: Any, outputs: Iterable[Any]) -> list[Any]:
    """Raises the reason where the callers of requests wait that the scheduler ended as too large,
    and returns the states of these requests. ``processor`` is the front end's ``OutputProcessor``,
    which is about to finish them.
    """
    failed = []
    for output in outputs:
        if output.finish_reason is FinishReason.ERROR and isinstance(output.stop_reason, str):
            state = processor.request_states.get(output.request_id)
            if state is not None and state.queue is not None:
                # What comes after it is not put into the queue: an error stays there.
                state.queue.put(RequestNeverFitsError(output.stop_reason))
                failed.append(state)
    return failed


def give_up_siblings(processor: Any, failed: Iterable[Any]) -> list[str]:
    """Forgets the other samples (``n``) of requests that have failed: their caller has its answer.
    Returns the ids that the engine has to abort.
    """
    parents = {state.parent_req.request_id for state in failed if state.parent_req is not None}
    if not parents:
        return []
    taken = inspect.signature(processor.abort_requests).parameters
    kind = {"internal": True} if "internal" in taken else {}  # vLLM 0.13 has one kind of id
    return list(processor.abort_requests(sorted(parents), **kind))
