"""SGLang's scheduler, followed step by step: where pages come and go."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from kvcached import watch
from kvcached.config import Config
from kvcached.engines.sglang import adapter, pressure
from kvcached.engines.sglang.admission import engine_of, length
from kvcached.engines.sglang.build import building
from kvcached.engines.sglang.engine import QUEUE_IN_DEMAND, ElasticEngine
from kvcached.engines.sglang.slots import View
from kvcached.errors import EngineError


def wrap_init(config: Config) -> Callable[[Any], Any]:
    """``Scheduler.__init__``: everything is built inside of it."""

    def replace(original: Any) -> Any:
        @functools.wraps(original)
        def __init__(self: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
            module = adapter.current()
            watch.end_with_parent()
            with building(config, module.arguments(server_args), module):
                original(self, server_args, *args, **kwargs)
            allocator = self.token_to_kv_pool_allocator
            engine = getattr(allocator, "engine", None)
            if not isinstance(engine, ElasticEngine):
                raise EngineError(
                    f"kvcached: SGLang built the allocator {type(allocator).__qualname__}, which "
                    "is not elastic"
                )
            self.kvcached_longest = (self.max_req_len, self.max_req_input_len)
            on_gpu = engine.build.device.memory is not None
            engine.start(module.Cache(self), module.stream(self) if on_gpu else 0)
            pressure.follow(engine, getattr(self, "idle_sleeper", None))

        return __init__

    return replace


def wrap_get_next_batch(
    batch_of: Callable[[Any], Any], chunk_left: Callable[[Any], int]
) -> Callable[[Any], Any]:
    """``Scheduler.get_next_batch_to_run``. ``batch_of`` finds the batch in its answer,
    ``chunk_left`` says how many tokens of a prompt that is taken in pieces are still to come.
    """

    def replace(original: Any) -> Any:
        @functools.wraps(original)
        def get_next_batch_to_run(self: Any, *args: Any, **kwargs: Any) -> Any:
            engine = engine_of(self)
            _bound_requests(self, engine)
            if engine.slots.short:
                # SGLang admits nobody until one of its own requests ends; memory may come from
                # others as well.
                self.running_batch.batch_is_full = False
            engine.begin_step()
            answer = original(self, *args, **kwargs)
            batch = batch_of(answer)
            in_line = self.waiting_queue[:QUEUE_IN_DEMAND] if engine.slots.short else ()
            waiting = [length(request) for request in in_line]
            runs = batch is not None or len(self.running_batch.reqs) > 0
            engine.end_step(chunk_left(self), waiting, runs)
            return answer

        return get_next_batch_to_run

    return replace


def _bound_requests(scheduler: Any, engine: ElasticEngine) -> None:
    """SGLang refuses what is longer, with both numbers."""
    longest, longest_input = scheduler.kvcached_longest
    most = engine.most_tokens()
    scheduler.max_req_len = min(longest, most)
    scheduler.max_req_input_len = min(longest_input, most - (longest - longest_input))


def wrap_run_batch(original: Any) -> Any:
    """``Scheduler.run_batch``: launches a step."""

    @functools.wraps(original)
    def run_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        engine_of(self).launch()
        return original(self, *args, **kwargs)

    return run_batch


def wrap_process_batch_result(original: Any) -> Any:
    """``Scheduler.process_batch_result``: the step is done, its requests may have ended."""

    @functools.wraps(original)
    def process_batch_result(self: Any, batch: Any, result: Any, *args: Any, **kwargs: Any) -> Any:
        done = original(self, batch, result, *args, **kwargs)
        if result is not None:  # older versions process a made-up batch first
            engine_of(self).finish()
        return done

    return process_batch_result


def wrap_idle(original: Any) -> Any:
    """What the scheduler's loop does where nothing runs; SGLang checks for leaks there."""

    @functools.wraps(original)
    def idle(self: Any, *args: Any, **kwargs: Any) -> Any:
        engine = engine_of(self)
        waits = len(self.waiting_queue) > 0
        if waits or engine.wants_idle():
            engine.idle(waits)
        with engine.slots.seen_as(View.COUNTING):
            return original(self, *args, **kwargs)

    return idle


def counting(original: Any) -> Any:
    """For methods that count slots, for statistics and leak checks."""

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        with engine_of(self).slots.seen_as(View.COUNTING):
            return original(self, *args, **kwargs)

    return method


def requests_under_way(scheduler: Any) -> Iterator[Any]:
    """The requests that may hold slots, each once."""
    batches = (scheduler.running_batch, scheduler.last_batch)
    found = [req for batch in batches if batch is not None for req in batch.reqs or ()]
    if scheduler.chunked_req is not None:
        found.append(scheduler.chunked_req)
    yield from {id(req): req for req in found}.values()
