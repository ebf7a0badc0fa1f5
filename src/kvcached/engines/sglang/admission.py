"""SGLang's admission and retraction, with memory that others may take at any moment.

What SGLang finds available it allocates a little later. In between, another engine may lease the
memory; so each check sets aside, or promises, what it has found.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from kvcached.engines.sglang.engine import ElasticEngine
from kvcached.engines.sglang.slots import View, blocks_for


def engine_of(owner: Any) -> ElasticEngine:
    """The engine of an object of SGLang's that knows the allocator."""
    engine: ElasticEngine = owner.token_to_kv_pool_allocator.engine
    return engine


def wrap_add_one_req(extend_tokens: Callable[[Any], int], refused: Any) -> Callable[[Any], Any]:
    """``PrefillAdder.add_one_req``: takes a request of the queue into the next step.

    ``extend_tokens`` says how many tokens of it are to be computed, ``refused`` is what SGLang
    answers where memory is short.
    """

    def replace(original: Any) -> Any:
        @functools.wraps(original)
        def add_one_req(self: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
            engine = engine_of(self)
            slots = engine.slots
            if engine.pages.closed:
                return refused  # what is free here is owed to others
            # All of the prompt, also where it is taken in pieces: SGLang cannot stop in between.
            computed = extend_tokens(req)
            blocks = blocks_for(computed, engine.block_tokens)
            with self._lock_node(req.last_node):
                if not slots.promise(blocks):
                    return refused
            before = len(self.can_run_list)
            result = original(self, req, *args, **kwargs)
            if result is refused and len(self.can_run_list) == 0 and not _runs(self):
                # SGLang wants room for the answer too. With nothing under way that could make
                # room, waiting helps nobody: the answer gets as far as memory goes.
                with slots.seen_as(View.COUNTING):
                    result = original(self, req, *args, **kwargs)
            if len(self.can_run_list) == before:
                slots.take_back(blocks)
            else:
                engine.pages.count_admitted(length(req) - computed, computed)
            return result

        return add_one_req

    return replace


def _runs(adder: Any) -> bool:
    return adder.running_batch is not None and len(adder.running_batch.reqs) > 0


def length(req: Any) -> int:
    """The tokens of a request: what it was asked and what it has answered."""
    return len(req.origin_input_ids) + len(req.output_ids)


def wrap_check_decode_mem(needed: Callable[..., int]) -> Callable[[Any], Any]:
    """``ScheduleBatch.check_decode_mem``: whether the next token of every request fits.

    ``needed`` says how many blocks it takes, from the same arguments.
    """

    def replace(original: Any) -> Any:
        @functools.wraps(original)
        def check_decode_mem(self: Any, *args: Any, **kwargs: Any) -> bool:
            slots = engine_of(self).slots
            if slots.retracts_to_one(_chosen(self, *args, **kwargs)):
                return True
            if not slots.secure(needed(self, *args, **kwargs)):
                return False
            fits: bool = original(self, *args, **kwargs)
            return fits

        return check_decode_mem

    return replace


def _chosen(batch: Any, selected_indices: Any = None, *_: Any, **__: Any) -> int:
    """How many requests a check is about: newer versions ask for some of a batch."""
    return len(selected_indices) if isinstance(selected_indices, list) else len(batch.reqs)


def wrap_retract_decode(
    needed: Callable[[Any], int],
    release_last: Callable[..., Any],
    answer: Callable[[list[Any]], Any],
) -> Callable[[Any], Any]:
    """``ScheduleBatch.retract_decode``: takes requests back into the queue until the others fit.

    SGLang keeps the last one, and fails where that does not fit. Here memory may be with others
    for a while: so it goes back into the queue as well. ``release_last`` releases the only request
    of a batch and returns it; ``answer`` is SGLang's answer for requests that were taken back.
    """

    def replace(original: Any) -> Any:
        @functools.wraps(original)
        def retract_decode(self: Any, *args: Any, **kwargs: Any) -> Any:
            slots = engine_of(self).slots
            if len(self.reqs) == 1:
                return answer([release_last(self, *args, **kwargs)])
            with slots.seen_as(View.RETRACTING):
                result = original(self, *args, **kwargs)
            if len(self.reqs) == 1 and not slots.secure(needed(self)):
                result[0].append(release_last(self, *args, **kwargs))
            return result

        return retract_decode

    return replace


def skip_when_empty(original: Any) -> Any:
    """``ScheduleBatch.prepare_for_decode`` of versions that never retract all requests."""

    @functools.wraps(original)
    def prepare_for_decode(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs) if self.reqs else None

    return prepare_for_decode
