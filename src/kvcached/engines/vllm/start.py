"""Starting on a GPU that others use: room for what is not pages, and no look at free memory.

vLLM finds out how large its KV cache may be by watching how much memory is free, and refuses to
start where that moves. Here it moves all the time, and the KV cache's size is addresses. What has
to be there is memory for the weights, the activations and the graphs: it is set aside in the
ledger, so that nobody leases it and others give back cached memory for it, until the engine runs
and the memory is measured as foreign.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kvcached.engines.base import substituted
from kvcached.engines.vllm.room import GpuRoom
from kvcached.units import GIB, format_size

logger = logging.getLogger(__name__)

# Beside the weights: the CUDA context, the activations of the largest batch, graphs. What exceeds
# it comes out of the headroom.
BESIDE_WEIGHTS_BYTES = 2 * GIB
NO_SLEEP_MODE = (
    "kvcached: this engine has no sleep mode. On a GPU it must be started with "
    "--enable-sleep-mode; on a CPU vLLM has none. An idle engine gives its KV cache's memory back "
    "by itself"
)
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.gguf")


class GpuStart(GpuRoom):
    """One worker's start on a shared GPU, from before its first allocation to its last warm-up."""

    _activation_bytes = 0

    @contextmanager
    def watching_activations(self, device: torch.device) -> Iterator[None]:
        """Notes the most that the block allocates at a time, by torch's own account: what is free
        on the device says nothing here.
        """
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield
        self._activation_bytes = torch.cuda.max_memory_allocated(device) - before

    def end(self, device: torch.device) -> None:
        """The engine runs: what it holds is measured, and nothing is set aside any more."""
        self.keep_activations(device)
        self.close()

    def missing_activations(self, device: torch.device) -> int:
        """Bytes that torch would have to take from the device for the largest activations."""
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(0, self._activation_bytes - int(cached))

    def keep_activations(self, device: torch.device) -> None:
        """Leaves torch with as much cached memory as the activations need. vLLM gives it back to
        the device before it captures graphs, and when it goes to sleep; then others would lease it.
        """
        if (missing := self.missing_activations(device)) == 0:
            return
        try:
            torch.empty(missing, dtype=torch.int8, device=device)
        except torch.OutOfMemoryError:
            logger.warning(
                "kvcached: %s has no %s left for the largest activations: they will be taken from "
                "the headroom",
                self._ledger.device,
                format_size(missing),
            )


@contextmanager
def without_memory_check() -> Iterator[None]:
    """vLLM demands at this point that a share of the whole GPU is free (gpu_memory_utilization)."""
    from vllm.v1.worker import gpu_worker

    if not hasattr(gpu_worker, "request_memory"):  # vLLM 0.8 does not look before it has loaded
        yield
        return
    with substituted(gpu_worker, request_memory=lambda snapshot, cache_config: 0):
        yield


def expect_any_free_memory(worker: Any) -> None:
    """vLLM 0.8 demands that less memory is free after its profiling run than when it started: not
    so where a neighbour gives some back. It compares the two numbers and uses neither.
    """
    if hasattr(worker, "init_gpu_memory"):
        worker.init_gpu_memory = sys.maxsize


def needed_bytes(vllm_config: Any) -> int:
    """What a worker allocates beside its pages while it starts, about."""
    model = vllm_config.model_config
    weights = weight_bytes(str(model.model), model.hf_text_config, model.dtype.itemsize)
    return weights // int(vllm_config.parallel_config.world_size) + BESIDE_WEIGHTS_BYTES


def weight_bytes(model: str, hf_config: Any, item_bytes: int) -> int:
    """The size of a model's weights: of its files, where it is a folder with some, or else what a
    dense or mixture-of-experts transformer of this shape has.
    """
    for pattern in _WEIGHT_FILES:
        if size := sum(path.stat().st_size for path in Path(model).glob(pattern)):
            return size

    def number(*names: str, default: int = 0) -> int:
        found = (getattr(hf_config, name, None) for name in names)
        return next((value for value in found if isinstance(value, int)), default)

    width, layers = number("hidden_size"), number("num_hidden_layers")
    heads = number("num_attention_heads", default=1)
    head = number("head_dim", default=width // heads)
    kv_heads = number("num_key_value_heads", default=heads)
    experts = number("num_local_experts", "num_experts", "n_routed_experts", default=1)
    inner = number("intermediate_size", default=4 * width)
    if experts > 1:
        inner = number("moe_intermediate_size", default=inner)
    layer = width * head * (2 * heads + 2 * kv_heads) + 3 * width * inner * experts
    embeddings = number("vocab_size") * width * (1 if _tied(hf_config) else 2)
    return (layers * layer + embeddings) * item_bytes


def _tied(hf_config: Any) -> bool:
    return bool(getattr(hf_config, "tie_word_embeddings", False))
