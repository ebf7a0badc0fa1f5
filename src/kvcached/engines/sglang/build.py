"""The SGLang engine that is being built in this process: who it is, where, and what it may be.

SGLang builds its KV cache deep inside its scheduler's constructor, from arguments that do not say
whose it is. What is known is kept here while that constructor runs.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvcached import foreign
from kvcached.config import Config
from kvcached.engines import devices
from kvcached.engines.devices import Device
from kvcached.engines.registry import OFF
from kvcached.engines.sglang import device
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
    """One engine under construction. ``arguments`` are SGLang's settings by name."""

    config: Config
    arguments: Mapping[str, Any]
    instance: str
    name: str
    device: Device
    ledger: Ledger
    memory: KvMemory | None = None

    @property
    def virtual_bytes(self) -> int:
        """Addresses for the KV cache: what SGLang believes to have."""
        return self.config.virtual_bytes or self.ledger.capacity

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
    place = device.of(config, arguments)
    build = Build(
        config,
        arguments,
        secrets.token_hex(16),
        config.name or _name_of(arguments["served_model_name"]),
        place,
        # Before everything else: at death the kernel drops the ledger's lock after what is numbered
        # above it, the memory and the driver's own files.
        devices.open_ledger(config, place),
    )
    token = _current.set(build)
    try:
        yield build
    finally:
        _current.reset(token)


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
        # All ranks must see the same free amount: see docs/integration.md.
        "tensor parallelism": arguments["tp_size"] > 1,
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
