"""vLLM 0.8.4's real engine around a toy model, for machines without a GPU.

Real are EngineCore, its scheduler, block pool and KV-cache manager, the executor and the model
runner's KV-cache initialisation. The worker computes with plain torch on the CPU: each token's
keys and values go into the KV cache at the slot that the scheduler gave it, and the next token is a
hash of all that it reads back there. An engine that loses, swaps or never maps a block says other
tokens, or dies.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch

os.environ.setdefault("VLLM_USE_V1", "1")  # by itself it takes V0 for a CPU

import vllm.platforms
import vllm.plugins
from vllm.platforms.cpu import CpuPlatform


class ToyPlatform(CpuPlatform):  # type: ignore[misc]
    """A CPU, whose settings are left as they are."""

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        return

    @classmethod
    def supports_v1(cls, model_config: Any) -> bool:
        return True


vllm.platforms._current_platform = ToyPlatform()

from vllm.attention import Attention, AttentionType  # noqa: E402
from vllm.config import VllmConfig  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend  # noqa: E402
from vllm.v1.executor.abstract import UniProcExecutor  # noqa: E402
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput  # noqa: E402
from vllm.v1.worker.gpu_model_runner import GPUModelRunner  # noqa: E402
from vllm.v1.worker.worker_base import WorkerBase  # noqa: E402

from kvcached.engines.vllm import adapter  # noqa: E402

LAYERS, HEADS, HEAD, TOKENS = 3, 2, 64, 16
VOCABULARY = 997  # all numbers below are whole, and small enough for 16 bits
PLAIN_BYTES = 32 << 20


class Executor(UniProcExecutor):  # type: ignore[misc]
    """vLLM's own; its name leads a spawned process to this module."""


class ExecutorWithoutPlugins(Executor):
    """With several ranks an engine's process starts the workers in processes of their own, and
    loads no plugins itself.
    """

    def _init_executor(self) -> None:
        vllm.plugins.plugins_loaded = True
        super()._init_executor()


def make_config(
    model: str, *, caching: bool, window: int | None = None, budget: int = 256, seqs: int = 8
) -> VllmConfig:
    """What vLLM makes of these arguments; elastic where kvcached is switched on: through its plugin
    or through a patched vLLM.
    """
    if elastic():
        adapter.current().PLATFORMS = ("cpu", "cuda")
    config = EngineArgs(
        model=model,
        skip_tokenizer_init=True,
        dtype="float16",
        max_model_len=1024,
        block_size=TOKENS,
        enable_prefix_caching=caching,
        max_num_batched_tokens=budget,
        max_num_seqs=seqs,
        device="cpu",
        worker_cls="toy_engine_0_8.ToyWorker",
        distributed_executor_backend="uni",
    ).create_engine_config()
    config.additional_config = {"window": window}  # in the arguments it would mean vLLM's V0 engine
    return config


def elastic() -> bool:
    return os.environ.get("ENABLE_KVCACHED") == "true"


class ToyWorker(WorkerBase):  # type: ignore[misc]
    """The toy model on one rank."""

    def init_device(self) -> None:
        self.device = torch.device("cpu")

    def load_model(self) -> None:
        """Real attention layers in the places where a real model has them, without weights."""
        self.window = self.vllm_config.additional_config["window"]
        context = self.vllm_config.compilation_config.static_forward_context
        for index in range(LAYERS):
            layer = Attention.__new__(Attention)
            torch.nn.Module.__init__(layer)
            layer.attn_type, layer.sliding_window = AttentionType.DECODER, self.window
            layer.num_kv_heads, layer.head_size = HEADS, HEAD
            context[f"model.layers.{index}.self_attn"] = layer
        runner = GPUModelRunner.__new__(GPUModelRunner)
        runner.vllm_config, runner.device = self.vllm_config, self.device
        runner.attn_backend = FlashAttentionBackend
        runner.kv_cache_dtype, runner.kv_caches = torch.float16, []
        self.model_runner = runner
        self.sequences: dict[str, tuple[list[int], list[int]]] = {}

    def get_kv_cache_spec(self) -> Any:
        return self.model_runner.get_kv_cache_spec()

    def determine_available_memory(self) -> int:
        return PLAIN_BYTES

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        self.model_runner.initialize_kv_cache(kv_cache_config)

    def compile_or_warm_up_model(self) -> None:
        return

    def sleep(self, level: int = 1) -> None:
        return

    def wake_up(self, tags: list[str] | None = None) -> None:
        return

    def execute_model(self, scheduler_output: Any) -> ModelRunnerOutput:
        if not scheduler_output.total_num_scheduled_tokens:
            return EMPTY_MODEL_RUNNER_OUTPUT
        for name in scheduler_output.finished_req_ids:
            self.sequences.pop(name, None)
        starts: dict[str, int] = {}
        for new in scheduler_output.scheduled_new_reqs:
            self.sequences[new.req_id] = (list(new.prompt_token_ids), list(new.block_ids))
            starts[new.req_id] = new.num_computed_tokens
        for old in scheduler_output.scheduled_cached_reqs:
            if old.resumed_from_preemption:
                self.sequences[old.req_id][1].clear()
            self.sequences[old.req_id][1].extend(old.new_block_ids)
            starts[old.req_id] = old.num_computed_tokens
        sampled = [
            self._advance(name, start, scheduler_output.num_scheduled_tokens[name])
            for name, start in starts.items()
        ]
        index = {name: number for number, name in enumerate(starts)}
        return ModelRunnerOutput(list(starts), index, sampled, None, None, dict.fromkeys(starts))

    def _advance(self, name: str, start: int, count: int) -> list[int]:
        tokens, blocks = self.sequences[name]
        end = start + count
        places = torch.arange(end)
        at = torch.tensor(blocks)[places // TOKENS], places % TOKENS
        values = torch.tensor(tokens[start:end], dtype=torch.float16)[:, None, None]
        first = 0 if self.window is None else max(0, end - self.window)
        total = 0
        for layer, cache in enumerate(self.model_runner.kv_caches):
            keys, vals = cache.unbind(0)
            new = at[0][start:], at[1][start:]
            keys[new] = (values + 31 * layer).expand(-1, HEADS, HEAD)
            vals[new] = (values * 2 + layer).expand(-1, HEADS, HEAD)
            seen = at[0][first:], at[1][first:]
            for read in (keys[seen], vals[seen]):
                assert (read == read[:, :1, :1]).all(), "a slot was written in part"
                total += int((read[:, 0, 0].long() * (places[first:] % 61 + 1)).sum())
        if end < len(tokens):
            return []
        tokens.append(total % (VOCABULARY - 3) + 3)
        return tokens[-1:]


@dataclasses.dataclass
class Ask:
    """A request: when it comes (the step), its prompt, and how many tokens it wants."""

    step: int
    prompt: list[int]
    tokens: int
    abort_after: int | None = None
