"""The SGLang engine that is being built in this process: who it is, where, and what it may be.

SGLang builds its KV cache deep inside its scheduler's constructor, from arguments that do not say
whose it is. What is known is kept here while that constructor runs.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvcached import foreign, watch
from kvcached.config import Config
from kvcached.engines import devices
from kvcached.engines.devices import Device, Devices
from kvcached.engines.registry import OFF
from kvcached.engines.sglang import device, ranks
from kvcached.errors import EngineError
from kvcached.ledger import Ledger

if TYPE_CHECKING:
    from kvcached.engines.sglang.buffers import KvMemory

logger = logging.getLogger(__name__)

_current: ContextVar[Build | None] = ContextVar("kvcached_sglang_build", default=None)

# Settings of SGLang that an adapter must be able to name.
_KNOWN = (
    *("tp_size", "pp_size", "dp_size", "nnodes", "device", "page_size", "attention_backend"),
    *("served_model_name", "speculative_algorithm", "disaggregation_mode", "enable_memory_saver"),
)

_SEEN_ON_GPU = frozenset({"triton"})
"""Attention backends that gave right outputs on a GPU."""


@dataclass(slots=True)
class Build:
    """One engine under construction, in the process of one of its ranks. ``arguments`` are SGLang's
    settings by name.
    """

    config: Config
    arguments: Mapping[str, Any]
    name: str
    devices: Devices
    ledgers: Mapping[str, Ledger]
    """By the names of their devices: the first rank has accounts on all of them."""
    instance: str = ""
    number: int = 0
    """Of this rank."""
    rank: ranks.Rank | None = None
    """Its part among several."""
    memory: KvMemory | None = None

    @property
    def device(self) -> Device:
        """This rank's."""
        return self.devices.by_rank[self.number]

    @property
    def ledger(self) -> Ledger:
        """Of this rank's device."""
        return self.ledgers[self.device.name]

    @property
    def virtual_bytes(self) -> int:
        """Addresses for the KV cache of each rank: what SGLang believes to have."""
        smallest = min(ledger.capacity for ledger in self.ledgers.values())
        return self.config.virtual_bytes or smallest // self.devices.ranks_each

    def meet(self, *shape: int) -> None:
        """Finds out who this rank is, and who else is of this engine; ``shape`` is what its KV
        cache has in common with theirs. Blocks for the others. Raises EngineError.
        """
        several = len(self.devices.by_rank)
        if several == 1:
            self.instance = secrets.token_hex(16)
            return
        group = _ranks_of_sglang()
        self.number = int(group.rank_in_group)
        mine = struct.pack(f"<{len(shape)}q", *shape)
        self.instance, self.rank = ranks.gather(self.number, several, _sharing(group), mine)
        watch.end_with(self.rank.pids)

    def measure(self) -> None:
        """Tells the ledger what is in use on the device beside pages."""
        if self.device.memory is not None:
            foreign.refresh(self.ledger, self.device.memory)


def current() -> Build:
    """The engine that is being built. Raises EngineError outside of a scheduler's constructor."""
    build = _current.get()
    if build is None:
        raise EngineError("kvcached: SGLang builds a KV cache outside of its scheduler")
    return build


@contextmanager
def building(config: Config, arguments: Mapping[str, Any], adapter: Any) -> Iterator[Build]:
    """While the block runs, an engine with these settings is being built.

    Raises EngineError where it cannot be elastic.
    """
    refuse_unsupported(arguments, adapter)
    warn_of_untried(arguments)
    places = device.of(config, arguments)
    # Before everything else: at death the kernel drops a ledger's lock after what is numbered above
    # it, the memory and the driver's own files.
    ledgers = devices.open_ledgers(config, places)
    build = Build(
        config,
        arguments,
        config.name or _name_of(arguments["served_model_name"]),
        places,
        {each.name: ledger for each, ledger in zip(places.distinct, ledgers, strict=True)},
    )
    token = _current.set(build)
    try:
        yield build
    finally:
        _current.reset(token)


def _ranks_of_sglang() -> Any:
    """SGLang's group of the ranks that share a model."""
    from sglang.srt.distributed import parallel_state

    return parallel_state.get_tp_group()


def _sharing(group: Any) -> Callable[[bytes], bytes]:
    """Gives all ranks of a group what its first one has."""
    import torch

    def share(mine: bytes) -> bytes:
        data = torch.tensor(list(mine), dtype=torch.uint8)
        torch.distributed.broadcast(data, src=group.ranks[0], group=group.cpu_group)
        return bytes(data.tolist())

    return share


def _name_of(served: Any) -> str:
    name = re.sub(r"[^\w.-]+", "-", os.path.basename(str(served).rstrip("/")))
    return name[:63] or "sglang"


def refuse_unsupported(arguments: Mapping[str, Any], adapter: Any) -> None:
    """Raises EngineError for what cannot be elastic yet, naming it."""
    unknown = [name for name in _KNOWN if name not in arguments]
    if unknown:
        raise EngineError(
            f"kvcached: this version of SGLang has no settings {', '.join(unknown)}: an adapter "
            f"must say what they are called now. {OFF}"
        )

    def on(name: str) -> bool:
        """Whether a setting that not every version has is used."""
        return arguments.get(name) not in (None, False, 0, "", "null", "none", [])

    kind = device.kind_of(arguments)
    for what, wrong in {
        f"{kind} engines with this version of SGLang": kind not in adapter.PLATFORMS,
        "pipeline parallelism": arguments["pp_size"] > 1,
        "data parallelism": arguments["dp_size"] > 1 or on("enable_dp_attention"),
        "several machines": arguments["nnodes"] > 1,
        "speculative decoding": on("speculative_algorithm"),
        "disaggregated prefill and decode": on("disaggregation_mode"),
        "the memory saver": on("enable_memory_saver"),
        "hierarchical caches": on("enable_hierarchical_cache") or on("enable_lmcache"),
        "mixed chunks of prefill and decode": on("enable_mixed_chunk"),
        "double sparsity": on("enable_double_sparsity"),
        "hierarchical sparse attention": on("enable_hisparse"),
        "unified memory": on("enable_unified_memory"),
        "multiplexed prefill and decode": on("enable_pdmux"),
    }.items():
        if wrong:
            raise EngineError(f"kvcached does not support {what} of SGLang yet. {OFF}")


def warn_of_untried(arguments: Mapping[str, Any]) -> None:
    """Says in the log that an attention backend was not seen with kvcached on a GPU."""
    backend = arguments["attention_backend"]
    if device.kind_of(arguments) != "cpu" and backend not in _SEEN_ON_GPU:
        logger.warning(
            "kvcached: SGLang's attention backend %s has not been run with kvcached on a GPU (%s "
            "has): compare its first answers with those of an engine without kvcached",
            backend,
            ", ".join(sorted(_SEEN_ON_GPU)),
        )
    if device.kind_of(arguments) != "cpu" and arguments["tp_size"] > 1:
        logger.warning(
            "kvcached: SGLang on several GPUs (tensor parallelism) has been run with kvcached on a "
            "CPU alone: compare its first answers with those of an engine without kvcached"
        )
