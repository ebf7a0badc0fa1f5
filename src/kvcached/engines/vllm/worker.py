"""vLLM's worker with its KV cache on an arena."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import torch

from kvcached import foreign, watch
from kvcached.cache import PageMapper
from kvcached.commands import Commands
from kvcached.config import Config
from kvcached.engines.registry import OFF
from kvcached.engines.vllm import (
    adapter,
    backends,
    device,
    geometry,
    identity,
    ranks,
    selftest,
    start,
)
from kvcached.engines.vllm.room import GpuRoom
from kvcached.engines.vllm.start import GpuStart
from kvcached.engines.vllm.zeros import AnswerZeros
from kvcached.errors import EngineError, KvcachedError
from kvcached.views import int8_tensor

if TYPE_CHECKING:
    from kvcached.engines.vllm.weights import SleepingWeights

logger = logging.getLogger(__name__)

_DRAIN_S = 5.0  # what the device may take to unmap what was freed


class ElasticWorker:
    """What kvcached adds to a worker class of vLLM; mixed in before it by ``elastic``."""

    vllm_config: Any
    cache_config: Any
    device: torch.device
    rank: int
    is_driver_worker: bool
    model_runner: Any
    _start: GpuStart | None = None
    _weights: SleepingWeights | None = None  # where they can sleep
    _warm = False
    _seen_mapped = False

    def init_device(self) -> Any:
        config, who = Config.from_env(), identity.of(self.vllm_config)
        if self.vllm_config.parallel_config.distributed_executor_backend == "mp":
            watch.end_with_parent(who.front_pid)  # this process is the worker's own
        devices = device.of(config, who.ranks)
        self._device = devices.by_rank[self.rank]
        self._ranks_here = devices.ranks_each
        # The ledger's lock before everything else: at death the kernel drops it after what is
        # numbered above it, the memory and the driver's own files.
        self._ledger = device.open_ledger(config, self._device)
        self._names = [each.name for each in devices.distinct]
        if who.ranks > 1:
            ranks.follow(config.directory, self._names, who)
        if self._device.memory is None:
            return super().init_device()  # type: ignore[misc]
        self._start = GpuStart(self._ledger, self._device.memory, who)
        with self._start.in_turn(self._names):
            self._start.wait_for_room(start.needed_bytes(self.vllm_config))
        with start.without_memory_check():
            return super().init_device()  # type: ignore[misc]

    def determine_available_memory(self) -> int:
        """The virtual size of the KV cache: addresses, not memory."""
        size = self.cache_config.kv_cache_memory_bytes
        if size is None:
            raise EngineError("kvcached: the KV cache's virtual size did not reach the worker")
        if self._start is not None:
            start.expect_any_free_memory(self)
            with self._start.watching_activations(self.device):
                super().determine_available_memory()  # type: ignore[misc]
            return int(size)
        # On a CPU vLLM compares the size with the memory that is available.
        self.cache_config.kv_cache_memory_bytes = 1
        try:
            super().determine_available_memory()  # type: ignore[misc]
        finally:
            self.cache_config.kv_cache_memory_bytes = size
        return int(size)

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        config, who = Config.from_env(), identity.of(self.vllm_config)
        selftest.check_built(worker=self, kv_cache_config=kv_cache_config)
        this_version = adapter.current()
        tensors, used = this_version.tensors, this_version.used_backends(self)
        limits = self._device.page_limits
        plan = backends.plan(
            self.vllm_config, used, kv_cache_config, tensors, config.layout, limits
        )
        shape = geometry.of(kv_cache_config, plan.runs, self._device, config.page_bytes)
        backend = self._device.open_backend(self._ordinal(), self._ledger.lock_fd)
        layout, zero_holes = shape.layout(plan.runs, backend.granularity), config.unmapped == "zero"
        pinned = layout.page_bytes + (layout.zero_bytes if zero_holes else 0)
        each = self._ranks_here
        member = self._ledger.attach(who.instance, who.name, pinned * each)
        member.describe(shape.block_bytes * each, shape.block_tokens, shape.page_bytes * each)
        self.mapper = PageMapper(
            self._ledger,
            member,
            backend,
            layout,
            map_timeout_s=config.map_timeout_s,
            zero_holes=zero_holes,
            on_refusal=self._measure,
        )
        placed = plan.apply(tensors, kv_cache_config, shape.paged_blocks)
        allocations = tensors.allocations(placed)
        with AnswerZeros(allocations, int8_tensor(self.mapper.arena)) as answer:
            super().initialize_from_config(placed)  # type: ignore[misc]
        if answer.left:
            raise EngineError(
                f"kvcached: vLLM did not allocate its KV cache in the expected way: of "
                f"{allocations}, {answer.left} are missing. {OFF}"
            )
        selftest.check_tensors(self.model_runner.kv_caches, self.mapper.arena)

    def compile_or_warm_up_model(self) -> Any:
        done = super().compile_or_warm_up_model()  # type: ignore[misc]
        self.mapper.drop_held(self._stream())
        self._warm = True
        if self._start is not None:
            self._start.end(self.device)
            if self.vllm_config.model_config.enable_sleep_mode:
                self._weights = self._weights_that_sleep(self._start)
        return done

    def _weights_that_sleep(self, started: GpuStart) -> SleepingWeights:
        from kvcached.engines.vllm.weights import SleepingWeights  # loads vLLM's pool

        return SleepingWeights(
            started,
            self.device,
            self._make_room,
            self._names,
            lambda: self.mapper.arena.created_bytes(),
        )

    def _make_room(self) -> GpuRoom:
        assert self._device.memory is not None
        who, timeout_s = identity.of(self.vllm_config), Config.from_env().map_timeout_s
        memory = self._device.memory
        return GpuRoom(self._ledger, memory, who, "the model to wake up", timeout_s)

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if self._weights is not None and self._weights.asleep:
            raise EngineError("kvcached: a step reached a worker whose model is asleep")
        self._carry_out(scheduler_output)
        return super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]

    def sleep(self, level: int = 1) -> None:
        weights = self._sleeping_weights()
        if weights.asleep:
            logger.warning("kvcached: the model is asleep already")
            return
        self.mapper.drain(_DRAIN_S)
        with weights.leaving(level):
            super().sleep(level)  # type: ignore[misc]

    def wake_up(self, tags: list[str] | None = None) -> None:
        with self._sleeping_weights().coming(tags, self.model_runner):
            super().wake_up(tags)  # type: ignore[misc]

    def make_room(self, tags: list[str] | None = None) -> str | None:
        """Called before ``wake_up``, by the engine's core on all ranks: waits for the memory that
        it takes. Returns what went wrong, in words, and never raises: of ranks that raise, vLLM
        would hear the first, and take the others' answers for those to its next question.
        """
        try:
            self._sleeping_weights().make_room(tags)
        except KvcachedError as error:
            return str(error)
        return None

    def leave_room(self) -> None:
        """Gives up what ``make_room`` got: another rank has none."""
        self._sleeping_weights().leave_room()

    def apply_commands(self, commands: Commands) -> None:
        """Commands that no step carries, by the engine's core, before it falls asleep."""
        self._apply(commands)

    def _sleeping_weights(self) -> SleepingWeights:
        if self._weights is None:
            raise EngineError(start.NO_SLEEP_MODE)
        return self._weights

    def _carry_out(self, scheduler_output: Any) -> None:
        """The one place where pages come and go."""
        if not self._warm:
            # vLLM's warm-up makes up steps on blocks of its choice; no scheduler is there yet.
            per_page = self.mapper.layout.blocks_per_page
            blocks = adapter.current().new_blocks(scheduler_output)
            self.mapper.hold(block // per_page for block in blocks)
            return
        if not hasattr(scheduler_output, "kvcached_commands"):
            raise EngineError(
                "kvcached: a step reached a worker without the scheduler's commands for its pages. "
                f"{OFF}"
            )
        if scheduler_output.kvcached_commands is not None:
            self._apply(scheduler_output.kvcached_commands)
        if not self._seen_mapped:
            blocks = adapter.current().new_blocks(scheduler_output)
            self._seen_mapped = selftest.check_mapped(blocks, self.mapper)

    def _apply(self, commands: Commands) -> None:
        try:
            self.mapper.apply(commands, self._stream())
        except KvcachedError as error:
            if self.is_driver_worker:
                raise
            # vLLM asks only its first rank for the outcome, and that one waits for this one's part.
            logger.critical("kvcached: rank %d of the engine ends: %s", self.rank, error)
            os._exit(1)

    def _ordinal(self) -> int:
        """Which of the GPUs that this process sees; 0 on the host."""
        return getattr(self.device, "index", None) or 0  # old workers for CPUs have no device

    def _stream(self) -> int:
        """The stream on which the model runs; 0 on the host, where work is done when it returns."""
        if self._device.memory is None:
            return 0
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def _measure(self) -> None:
        if self._device.memory is not None:
            foreign.refresh(self._ledger, self._device.memory)


def elastic(base: type) -> type:
    """The elastic subclass of a worker class."""
    return type(f"Elastic{base.__name__}", (ElasticWorker, base), {})
