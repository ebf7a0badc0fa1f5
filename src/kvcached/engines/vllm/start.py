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
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from kvcached import foreign
from kvcached.engines.base import substituted
from kvcached.engines.vllm.identity import Identity
from kvcached.foreign import Memory
from kvcached.ledger import Ledger
from kvcached.units import GIB, format_size

logger = logging.getLogger(__name__)

# Beside the weights: the CUDA context, the activations of the largest batch, graphs. What exceeds
# it comes out of the headroom.
BESIDE_WEIGHTS_BYTES = 2 * GIB
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
_ASK_AGAIN_S = 0.05
_SAY_AGAIN_S = 5.0


class GpuStart:
    """One worker's start on a shared GPU, from before its first allocation to its last warm-up."""

    def __init__(self, ledger: Ledger, memory: Memory, who: Identity) -> None:
        self._ledger = ledger
        self._memory = memory
        self._instance = who.instance
        self._member = ledger.attach(who.instance, who.name)
        self._activation_bytes = 0
        self._least = 0  # bytes that it sets aside in any case

    def wait_for_room(self, size_bytes: int) -> None:
        """Sets memory aside, and waits until it is there: others give back for it what they only
        cache, and lease nothing meanwhile.
        """
        self.measure()
        said = 0.0
        while not self._member.set_aside(self._wanted(size_bytes)):
            now = time.monotonic()
            if now - said > _SAY_AGAIN_S:
                said = now
                snapshot = self._ledger.snapshot()
                logger.warning(
                    "kvcached: waiting on %s for %s of memory for the model to load; KV caches "
                    "hold %s, and %s are in use beside them",
                    self._ledger.device,
                    format_size(size_bytes),
                    format_size(snapshot.charge),
                    format_size(snapshot.foreign),
                )
            time.sleep(_ASK_AGAIN_S)
            self.measure()

    @contextmanager
    def in_turn(self, devices: Sequence[str]) -> Iterator[None]:
        """Enters the block when the instance has room on all ``devices`` before this one, and
        leaves it when it has room on all of them.

        Every engine takes its devices in this order, so two that start at the same time do not
        wait for each other with half of the room each; and no rank starts before all can, since
        vLLM's ranks wait for each other for a limited time only.
        """
        own, directory = self._ledger.device, self._ledger.path.parent
        with ExitStack() as stack:
            ledgers = [
                stack.enter_context(Ledger.open(directory, name, create=False, read_only=True))
                for name in devices
                if name != own
            ]
            self._least = 1 if ledgers else 0  # so that other ranks see that it was granted
            self._wait_for_ranks([ledger for ledger in ledgers if ledger.device < own])
            yield
            self._wait_for_ranks(ledgers)

    def _wait_for_ranks(self, ledgers: Sequence[Ledger]) -> None:
        for ledger in ledgers:
            while not _has_room(ledger, self._instance):
                time.sleep(_ASK_AGAIN_S)

    def _wanted(self, size_bytes: int) -> int:
        """What of it lies in the ledger's capacity, as far as it can be had at all."""
        inside = foreign.inside(self._ledger, self._memory, size_bytes)
        return max(self._least, min(inside, self._most()))

    def _most(self) -> int:
        """What could be had if everybody else kept only what is theirs: more is never there, and
        whether less is enough is for the engine to find out.
        """
        now = self._ledger.snapshot()
        floors = sum(max(account.guarantee, account.pinned) for account in now.accounts)
        return max(0, now.capacity - now.headroom - now.foreign - floors)

    def measure(self) -> None:
        """Tells the ledger what is in use beside pages."""
        foreign.refresh(self._ledger, self._memory)

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
        self._keep_activations(device)
        self.measure()
        self._member.close()

    def _keep_activations(self, device: torch.device) -> None:
        """Leaves torch with as much cached memory as the activations need. vLLM gives it back to
        the device before it captures graphs; then others would lease it.
        """
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if (missing := self._activation_bytes - cached) <= 0:
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


def _has_room(ledger: Ledger, instance: str) -> bool:
    """Whether a member of the instance has been granted what it set aside there."""
    account = ledger.snapshot().account(instance)
    members = () if account is None else account.members
    return any(member.set_aside > 0 and member.demand == 0 for member in members)


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
