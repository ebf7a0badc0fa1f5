"""vLLM's worker with its KV cache on an arena."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from kvcached import foreign, watch
from kvcached.cache import PageMapper
from kvcached.config import Config
from kvcached.engines.vllm import adapter, backends, device, geometry, identity, start
from kvcached.engines.vllm.start import GpuStart
from kvcached.errors import EngineError, KvcachedError
from kvcached.views import int8_tensor

logger = logging.getLogger(__name__)


class AnswerZeros(TorchFunctionMode):  # type: ignore[misc]
    """Answers each ``torch.zeros`` of the KV cache, of these sizes in this order, with the next
    bytes of the arena's tensor.
    """

    def __init__(self, sizes_bytes: Sequence[int], tensor: torch.Tensor) -> None:
        super().__init__()
        self.left = list(sizes_bytes)
        self._tensor = tensor
        self._start = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.zeros and kwargs.get("dtype") == torch.int8:
            size = args[0] if len(args) == 1 else args or kwargs.get("size")
            if self.left and size in (self.left[0], (self.left[0],)):
                start, self._start = self._start, self._start + self.left.pop(0)
                return self._tensor[start : self._start]
        return func(*args, **kwargs)


class ElasticWorker:
    """What kvcached adds to a worker class of vLLM; mixed in before it by ``elastic``."""

    vllm_config: Any
    cache_config: Any
    device: torch.device
    rank: int
    is_driver_worker: bool
    _start: GpuStart | None = None
    _warm = False

    def init_device(self) -> Any:
        config, who = Config.from_env(), identity.of(self.vllm_config)
        if self.vllm_config.parallel_config.distributed_executor_backend == "mp":
            watch.end_with_parent(who.front_pid)  # this process is the worker's own
        devices = device.of(config, self.vllm_config.parallel_config.world_size)
        self._device = devices.by_rank[self.rank]
        self._ranks_here = devices.ranks_each
        # The ledger's lock before everything else: at death the kernel drops it after what is
        # numbered above it, the memory and the driver's own files.
        self._ledger = device.open_ledger(config, self._device)
        if self._device.memory is None:
            return super().init_device()  # type: ignore[misc]
        self._start = GpuStart(self._ledger, self._device.memory, who)
        with self._start.in_turn([each.name for each in devices.distinct]):
            self._start.wait_for_room(start.needed_bytes(self.vllm_config))
        with start.without_memory_check():
            return super().init_device()  # type: ignore[misc]

    def determine_available_memory(self) -> int:
        """The virtual size of the KV cache: addresses, not memory."""
        size = self.cache_config.kv_cache_memory_bytes
        if size is None:
            raise EngineError("kvcached: the KV cache's virtual size did not reach the worker")
        if self._start is not None:
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
        tensors = adapter.current().tensors
        plan = backends.plan(self.vllm_config, kv_cache_config, tensors, config.layout)
        shape = geometry.of(kv_cache_config, plan.runs, self._device, config.page_bytes)
        backend = self._device.open_backend(self.device.index or 0, self._ledger.lock_fd)
        layout, zero_holes = shape.layout(plan.runs, backend.granularity), config.unmapped == "zero"
        pinned = layout.page_bytes + (layout.zero_bytes if zero_holes else 0)
        ranks = self._ranks_here
        member = self._ledger.attach(who.instance, who.name, pinned * ranks)
        member.describe(shape.block_bytes * ranks, shape.block_tokens, shape.page_bytes * ranks)
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
        sizes = tensors.allocations(placed)
        with AnswerZeros(sizes, int8_tensor(self.mapper.arena, 0, sum(sizes))) as answer:
            super().initialize_from_config(placed)  # type: ignore[misc]
        if answer.left:
            raise EngineError(
                f"kvcached: vLLM did not allocate its KV cache in the expected way: of {sizes} "
                f"bytes, {answer.left} are missing"
            )

    def compile_or_warm_up_model(self) -> Any:
        done = super().compile_or_warm_up_model()  # type: ignore[misc]
        self.mapper.drop_held(self._stream())
        self._warm = True
        if self._start is not None:
            self._start.end(self.device)
        return done

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        self._carry_out(scheduler_output)
        return super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]

    def sleep(self, level: int = 1) -> None:
        raise EngineError(
            "kvcached: sleep mode is not supported: an idle engine gives its KV cache's memory "
            "back by itself"
        )

    def _carry_out(self, scheduler_output: Any) -> None:
        """The one place where pages come and go."""
        if not self._warm:
            # vLLM's warm-up makes up steps on blocks of its choice; no scheduler is there yet.
            per_page = self.mapper.layout.blocks_per_page
            self.mapper.hold(block // per_page for block in _blocks(scheduler_output))
            return
        commands = scheduler_output.kvcached_commands
        if commands is None:
            return
        try:
            self.mapper.apply(commands, self._stream())
        except KvcachedError as error:
            if self.is_driver_worker:
                raise
            # vLLM asks only its first rank for the outcome, and that one waits for this one's part.
            logger.critical("kvcached: rank %d of the engine ends: %s", self.rank, error)
            os._exit(1)

    def _stream(self) -> int:
        """The stream on which the model runs; 0 on the host, where work is done when it returns."""
        if self.device.type != "cuda":
            return 0
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def _measure(self) -> None:
        if self._device.memory is not None:
            foreign.refresh(self._ledger, self._device.memory)


def _blocks(scheduler_output: Any) -> Iterator[int]:
    """The blocks that a step brings in."""
    for request in scheduler_output.scheduled_new_reqs:
        for group in request.block_ids:
            yield from group
    for groups in scheduler_output.scheduled_cached_reqs.new_block_ids:
        for group in groups or ():
            yield from group


def elastic(base: type) -> type:
    """The elastic subclass of a worker class."""
    return type(f"Elastic{base.__name__}", (ElasticWorker, base), {})
