"""vLLM's scheduler with elastic pages under it."""

from __future__ import annotations

import importlib
import inspect
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from vllm.v1.request import RequestStatus

from kvcached.commands import Commands
from kvcached.config import Config
from kvcached.engines import signatures
from kvcached.engines.base import substituted
from kvcached.engines.course import Course
from kvcached.engines.devices import join
from kvcached.engines.vllm import adapter, device, geometry, identity, selftest
from kvcached.engines.vllm.never_fits import reason
from kvcached.engines.vllm.pool import ElasticBlockPool, ElasticKVCacheManager
from kvcached.errors import EngineError
from kvcached.group import grouped
from kvcached.pages import PagePool
from kvcached.units import format_size
from kvcached.vmm_ops import Blocks

logger = logging.getLogger(__name__)

# An engine that can only wait sleeps on the ledger; at most so long, for its clients' messages.
WAIT_S = 0.05
# A step waits for memory that others are about to give back: at most so long, and at most so much
# of the time that the step before took.
PATIENCE_S = 0.25
PATIENCE_SHARE = 0.1
# Pages that are worth a message to the workers before the step that needs them.
EARLY_PAGES = 8

Carry = Callable[[Commands], None]
"""Takes commands to the workers without a step, and returns when they have them."""


class ElasticScheduler:
    """What kvcached adds to a scheduler class of vLLM; mixed in before it by ``elastic``.

    Every method runs on the scheduler's own thread.
    """

    kv_cache_manager: Any
    requests: Any
    running: Any
    waiting: Any
    max_num_running_reqs: int
    max_num_scheduled_tokens: int
    followed = False  # by the thread that waits for pressure from others
    asleep = False  # no step may run: there are no weights
    carry: Carry | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        speaking = signatures.speaking(type(self), "__init__", after=ElasticScheduler)
        given = inspect.signature(speaking).bind(self, *args, **kwargs).arguments
        vllm_config = given.get("vllm_config", given.get("scheduler_config"))
        cache_config = given["kv_cache_config"]
        this_version = adapter.current()
        self._version = this_version.scheduling
        with (
            substituted(self._version.POOL_MADE_IN, BlockPool=ElasticBlockPool),
            substituted(_scheduler_module(type(self)), KVCacheManager=ElasticKVCacheManager),
        ):
            super().__init__(*args, **kwargs)
        manager = self.kv_cache_manager
        pool = manager.block_pool
        if not isinstance(manager, ElasticKVCacheManager) or not isinstance(pool, ElasticBlockPool):
            raise EngineError("kvcached: vLLM built its KV-cache manager from other classes")
        selftest.check_built(scheduler=self, manager=manager, pool=pool, block=pool.null_block)

        config = Config.from_env()
        who = identity.of(vllm_config)
        devices = device.of(config, who.ranks)
        self.devices = devices.distinct
        self.ledgers = device.open_ledgers(config, devices)
        block_bytes = this_version.tensors.block_bytes(cache_config)
        row = self.ledgers[0].snapshot().account(who.instance)
        shape = geometry.described(cache_config, block_bytes, devices.ranks_each, row)
        # What a device is charged: each rank there maps the page, with its part of each block.
        page_bytes = shape.page_bytes * devices.ranks_each
        self._block_bytes = shape.block_bytes * devices.ranks_each
        self.accounts = join(config, self.ledgers, who.instance, who.name, page_bytes)
        self.account = grouped(self.accounts, page_bytes)
        self.account.describe(self._block_bytes, shape.block_tokens, page_bytes)
        self.pages = PagePool(
            Blocks(shape.num_blocks, shape.blocks_per_page),
            self.account,
            page_bytes,
            warm_low=config.warm_low,
            warm_high=config.warm_high,
            max_cached_blocks=(
                None
                if config.max_cached_tokens < 0
                else config.max_cached_tokens // shape.block_tokens
            ),
            preempt=config.preempt,
            on_evict=pool.forget,
        )
        pool.bind(self.pages)
        manager.this_version = self._version
        manager.on_refusal = self._be_patient
        manager.on_shortage = self._note_shortage
        self.instance, self._name = who.instance, who.name
        self._shape = shape
        self._blocks_a_step = self.max_num_scheduled_tokens // shape.block_tokens
        self._blocks_grown = shape.blocks_grown  # read in each step
        self._ended = False
        self._short = False
        self._wanted = False  # the demand of this step is said
        self._waits = False  # the last step could only wait for memory
        self._freed = 0  # the ledger's sequence before it
        self._scheduled_s = time.monotonic()
        self._patience_s = 0.0  # what this step may still wait for memory that is about to come
        self._in_flight = 0  # steps with tokens whose output has not come yet
        self._arrived = 0  # blocks of the prompts that came since the last step
        self._course = Course(shape.block_tokens)
        self._hopeless: dict[str, str] = {}  # why requests can never fit, by their ids
        logger.info(
            "kvcached: %s on %s: %d blocks of %s, pages of %s, capacity %s",
            who.name,
            ", ".join(ledger.device for ledger in self.ledgers),
            shape.num_blocks,
            format_size(self._block_bytes),
            format_size(page_bytes),
            ", ".join(format_size(ledger.capacity) for ledger in self.ledgers),
        )

    # --- vLLM's methods

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        self.pages.relieve()
        if self._waits:
            self._await_lease(self._freed, time.monotonic() + WAIT_S)
        before_s, self._scheduled_s = self._scheduled_s, time.monotonic()
        self._patience_s = min(PATIENCE_S, PATIENCE_SHARE * (self._scheduled_s - before_s))
        self._freed = self.account.freed_seq
        self._short = self._wanted = False
        self._arrived = 0
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        if not self._short:
            self.account.set_demand(0)
        self._course.leave(output.finished_req_ids)
        if output.total_num_scheduled_tokens > 0:
            new = (self.requests[each.req_id] for each in output.scheduled_new_reqs)
            self._course.begin_step((one.request_id, one.num_tokens, one.max_tokens) for one in new)
        self._settle()
        commands = self.pages.take_commands()
        output.kvcached_commands = commands
        self._in_flight += output.total_num_scheduled_tokens > 0
        self._waits = self._short and commands is None and self._can_only_wait(output)
        return output

    def _await_lease(self, seen: int, end_s: float) -> bool:
        """Sleeps on the ledger until memory has come back and is enough for the lease that was
        refused; False if it is not in time. It comes in pieces, and an attempt for each would cost
        a step.
        """
        while (left_s := end_s - time.monotonic()) > 0:
            now = self.account.wait_freed(seen, left_s)
            if now != seen and self.account.leasable() >= self.pages.refused_bytes:
                return True
            seen = now
        return False

    def _be_patient(self, request: Any, needed: int) -> bool:
        """Waits a moment, where others are about to give back what was refused; whether they did.

        They do within milliseconds, and a step may take seconds: a request that must wait for the
        next one waits that long, and one that runs is preempted.
        """
        self._raise_demand(request, needed)
        if self._patience_s <= 0 or not self.pages.expects():
            return False
        start_s = time.monotonic()
        came = self._await_lease(self._freed, start_s + self._patience_s)
        self._patience_s -= time.monotonic() - start_s
        return came

    def update_from_output(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = super().update_from_output(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        self._in_flight -= scheduler_output.total_num_scheduled_tokens > 0
        if self._hopeless:
            outputs = self._fail_hopeless(outputs)
        self._settle()
        return outputs

    def add_request(self, request: Any) -> None:
        super().add_request(request)  # type: ignore[misc]
        self._waits = False
        blocks = self._shape.least_blocks(request.num_tokens)
        self._check_fits(request, blocks)
        self._arrived += blocks
        self._map_early()

    def finish_requests(self, *args: Any, **kwargs: Any) -> Any:
        finished = super().finish_requests(*args, **kwargs)  # type: ignore[misc]
        self._waits = False
        # Also the way in for pressure from others: an empty abort wakes an idle engine to here.
        self.pages.relieve()
        self._settle()
        return finished

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> Any:
        done = super().reset_prefix_cache(*args, **kwargs)  # type: ignore[misc]
        self._settle()
        return done

    def has_requests(self) -> bool:
        if self.asleep:
            return False
        # Commands must leave: an idle engine makes an empty step that carries them.
        return bool(
            super().has_requests()  # type: ignore[misc]
            or self.pages.has_commands()
            or self._hopeless
        )

    def shutdown(self) -> None:
        if self._ended:
            return
        self._ended = True
        end = getattr(super(), "shutdown", None)  # vLLM 0.8's schedulers have none
        if end is not None:
            end()
        self.account.close()
        for ledger in self.ledgers:
            ledger.close()

    # --- ours

    def note_asleep(self, asleep: bool) -> None:
        """vLLM's sleep mode has done, or tried, what it was told to."""
        self.asleep = asleep
        self.account.set_asleep(asleep)

    def fall_asleep(self) -> Commands | None:
        """Gives up every page that no request uses, and makes no step until the engine wakes.
        Returns commands that the caller carries.
        """
        self.asleep = True
        self.pages.give_up(self.pages.blocks.num_pages)
        self.account.set_demand(0)
        self.pages.publish()
        return self.pages.take_commands()

    def _settle(self) -> None:
        if not self.asleep:  # what would be mapped ahead could not leave
            blocks = self.pages.blocks
            coming = in_line = self._blocks_coming(self._blocks_a_step)
            if blocks.empty_pages * blocks.blocks_per_page > coming:
                in_line = self._blocks_coming(math.inf)
            idle = blocks.used_blocks <= 1 and not in_line
            growth = 0 if self._short else self._course.growing() * self._blocks_grown
            self.pages.settle(idle, coming + growth, in_line + growth)
        self.pages.publish()

    def _map_early(self) -> None:
        """An engine at rest begins to map while a burst still arrives: its first step would wait
        for all of its pages. One at work maps for the next step while a step computes.
        """
        if self.carry is None or self.asleep or self.running or self._in_flight or self._short:
            return
        coming = min(self._arrived, self._blocks_a_step)
        blocks = self.pages.blocks
        missing = coming // blocks.blocks_per_page - blocks.empty_pages
        least = 1 if coming == self._blocks_a_step else EARLY_PAGES  # the rest of a whole step
        if missing < least or len(self.waiting) < 2:  # one alone takes its step at once
            return
        self.pages.foresee(coming)
        commands = self.pages.take_commands()
        if commands is not None:
            self.pages.publish()
            self.carry(commands)

    def _can_only_wait(self, output: Any) -> bool:
        # With a step under way its output comes first: it may be what ends the shortage.
        return output.total_num_scheduled_tokens == 0 and not self.running and not self._in_flight

    def _raise_demand(self, request: Any, needed: int) -> None:
        """To all that could run if there were memory: once a step, at its first shortage."""
        if not self._wanted:
            self._wanted = True
            queued = self._blocks_waited_for()  # with this request, unless it runs already
            running = request.status == RequestStatus.RUNNING
            self.pages.want(needed + queued if running else max(needed, queued))

    def _note_shortage(self, request: Any, needed: int) -> None:
        self._raise_demand(request, needed)
        self._short = True
        held = self._version.blocks_held(self.kv_cache_manager, request.request_id)
        self._check_fits(request, needed + held)

    def _blocks_waited_for(self) -> int:
        """Blocks of the prompts that could run at once if there were memory for them."""
        least = self._shape.least_blocks
        return sum(least(request.num_tokens) for request in self._next_in_line())

    def _next_in_line(self, leaving: int = 0) -> Iterator[Any]:
        room = max(0, self.max_num_running_reqs - len(self.running) + leaving)
        return itertools.islice(self.waiting, room)

    def _blocks_coming(self, most: float) -> int:
        """Blocks of the prompts in line that can run or soon will, ``most`` at most, where memory
        is not short. What is cached of them counts too: a page too many is given back when the line
        has ended.
        """
        if self._short or not self.waiting:
            return 0
        blocks = 0
        for request in self._next_in_line(self._course.ending()):
            blocks += self._shape.least_blocks(request.num_tokens)
            if blocks >= most:
                return int(most)
        return blocks

    def _check_fits(self, request: Any, blocks: int) -> None:
        most = self.most_blocks()
        if blocks <= most or request.request_id in self._hopeless:
            return
        why = reason(
            f"{request.num_tokens} tokens",
            blocks,
            self._name,
            most,
            (self._shape.block_tokens, self._block_bytes),
        )
        logger.error("kvcached: request %s fails: %s", request.request_id, why)
        self._hopeless[request.request_id] = why

    def most_blocks(self) -> int:
        """The blocks that this instance could have if the others kept only what is theirs."""
        pages = self.account.ceiling() // self.pages.page_bytes
        return min(pages * self._shape.blocks_per_page, self._shape.num_blocks) - 1

    def _fail_hopeless(self, outputs: Any) -> Any:
        reasons, self._hopeless = self._hopeless, {}
        found = [(self.requests.get(request_id), why) for request_id, why in reasons.items()]
        failed = [(r, why) for r, why in found if r is not None and not r.is_finished()]
        super().finish_requests(list(reasons), self._version.FAILED)  # type: ignore[misc]
        return self._version.report_failed(outputs, failed)


def _scheduler_module(cls: type) -> Any:
    """The module whose name KVCacheManager vLLM's Scheduler uses."""
    for base in cls.__mro__:
        if base.__name__ == "Scheduler" and base.__module__.startswith("vllm."):
            return importlib.import_module(base.__module__)
    raise EngineError(f"kvcached: {cls.__mro__[1].__qualname__} is no subclass of vLLM's Scheduler")


def elastic(base: type) -> type:
    """The elastic subclass of a scheduler class."""
    return type(f"Elastic{base.__name__}", (ElasticScheduler, base), {})
