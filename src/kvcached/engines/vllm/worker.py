"""vLLM's worker with its KV cache on an arena (vLLM 0.32)."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from kvcached import watch
from kvcached.cache import PageMapper
from kvcached.config import Config
from kvcached.engines.vllm import device, geometry, identity
from kvcached.errors import EngineError
from kvcached.views import int8_tensor


class AnswerZeros(TorchFunctionMode):  # type: ignore[misc]
    """Answers the one ``torch.zeros`` of the KV cache's size with the arena's tensor."""

    def __init__(self, size_bytes: int, tensor: torch.Tensor) -> None:
        super().__init__()
        self.hits = 0
        self._size_bytes = size_bytes
        self._tensor = tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.zeros and kwargs.get("dtype") == torch.int8:
            size = args[0] if len(args) == 1 else args or kwargs.get("size")
            if size in (self._size_bytes, (self._size_bytes,)):
                self.hits += 1
                return self._tensor
        return func(*args, **kwargs)


class ElasticWorker:
    """What kvcached adds to a worker class of vLLM; mixed in before it by ``elastic``."""

    def init_device(self) -> Any:
        if self.parallel_config.distributed_executor_backend == "mp":  # type: ignore[attr-defined]
            # This process is the worker's own.
            watch.end_with_parent(identity.of(self.vllm_config).front_pid)  # type: ignore[attr-defined]
        return super().init_device()  # type: ignore[misc]

    def determine_available_memory(self) -> int:
        """The virtual size of the KV cache: addresses, not memory."""
        if self._should_warm_up_model():  # type: ignore[attr-defined]
            self.model_runner.warming_up_model()  # type: ignore[attr-defined]
        size = self.cache_config.kv_cache_memory_bytes  # type: ignore[attr-defined]
        if size is None:
            raise EngineError("kvcached: the KV cache's virtual size did not reach the worker")
        return int(size)

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        config = Config.from_env()
        who = identity.of(self.vllm_config)  # type: ignore[attr-defined]
        # The ledger's lock first: at death the kernel drops it after the memory numbered above it.
        ledger = device.open_ledger(config)
        backend = device.open_backend(config, ledger.lock_fd)
        shape = geometry.of(kv_cache_config, backend.granularity, config.page_bytes)
        member = ledger.attach(who.instance, who.name, shape.page_bytes)
        self.mapper = PageMapper(
            ledger,
            member,
            backend,
            shape.layout(backend.granularity),
            map_timeout_s=config.map_timeout_s,
        )
        size = shape.num_blocks * shape.block_bytes
        with AnswerZeros(size, int8_tensor(self.mapper.arena, 0, size)) as answer:
            super().initialize_from_config(geometry.block_outermost(kv_cache_config))  # type: ignore[misc]
        if answer.hits != 1:
            raise EngineError(
                f"kvcached: vLLM allocated its KV cache {answer.hits} times in the expected way"
            )
        self._ledger = ledger

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        commands = scheduler_output.kvcached_commands
        if commands is not None:
            cuda = torch.cuda
            stream = cuda.current_stream().cuda_stream if cuda.is_initialized() else 0
            self.mapper.apply(commands, stream)
        return super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]


def elastic(base: type) -> type:
    """The elastic subclass of a worker class."""
    return type(f"Elastic{base.__name__}", (ElasticWorker, base), {})
