"""How the KV cache is to lie: asked of the attention backend of each layer of a model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vllm.config import set_current_vllm_config

from kvcached.engines.vllm.geometry import layer_specs
from kvcached.errors import EngineError
from kvcached.layout import PageLimits

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """A decision. ``runs``: the bytes of a block in each run of blocks; one where a block's layers
    lie together, a few where they lie together in groups.
    """

    block_outermost: bool
    runs: tuple[int, ...]

    def apply(self, tensors: Any, cache_config: Any, paged_blocks: int) -> Any:
        """The KV-cache configuration that says so to vLLM."""
        if self.block_outermost and len(self.runs) > 1:
            return tensors.grouped(cache_config, len(self.runs), paged_blocks)
        if self.block_outermost:
            return tensors.block_outermost(cache_config)
        return tensors.layer_outermost(cache_config, paged_blocks)


def plan(
    vllm_config: Any,
    used: Mapping[str, Any],
    cache_config: Any,
    tensors: Any,
    wanted: str,
    limits: PageLimits,
) -> Plan:
    """Decides by what is wanted (``Config.layout``), by what the backends take that the layers use,
    and by what a good page is on the device.

    Raises EngineError where what is wanted cannot be had.
    """
    together = Plan(True, (tensors.block_bytes(cache_config),))
    if tensors.is_packed(cache_config):
        if wanted == "layer":
            raise EngineError(
                "kvcached: KVCACHED_LAYOUT=layer, but vLLM itself lays the layers of this model's "
                "blocks together"
            )
        return together
    with set_current_vllm_config(vllm_config):  # backends ask it for the layout
        dtype = vllm_config.cache_config.cache_dtype
        return decide(used, cache_config, tensors, wanted, dtype, limits)


def decide(
    used: Mapping[str, Any],
    cache_config: Any,
    tensors: Any,
    wanted: str,
    cache_dtype: str,
    limits: PageLimits,
) -> Plan:
    """The same from the backend of each layer, for a KV cache that vLLM does not pack itself."""
    specs = {
        name: spec
        for group in cache_config.kv_cache_groups
        for name, spec in _specs_by_layer(group)
        if name in used
    }
    wrong = sorted({why for name in specs if (why := _refusal(used[name], specs[name], tensors))})
    if wrong and wanted == "block":
        raise EngineError(f"kvcached: KVCACHED_LAYOUT=block, but there is {', '.join(wrong)}")
    new = {used[name].get_name() for name in specs} - tensors.BACKENDS
    whole = tensors.block_bytes(cache_config)
    if wanted == "block":
        return Plan(True, (whole,))
    if wanted == "auto" and not wrong and not new:
        runs = 1
        if limits.max_runs > 1 and hasattr(tensors, "grouped"):
            runs = tensors.groups(cache_config, limits.max_runs, limits.min_run_bytes)
        return Plan(True, (whole // runs,) * runs)
    reasons = wrong or [f"{name}, not tried with blocks outermost" for name in sorted(new)]
    logger.info(
        "kvcached: each layer's KV cache lies apart, and a page takes a handle for each (%s)",
        ", ".join(reasons) or "KVCACHED_LAYOUT=layer",
    )
    planes = {name: tensors.planes(used[name], spec, cache_dtype) for name, spec in specs.items()}
    return Plan(False, tensors.runs(cache_config, planes))


def _refusal(backend: Any, spec: Any, tensors: Any) -> str | None:
    """Why a layer cannot have its blocks among those of other layers; None if it can."""
    if why := tensors.refusal(backend):
        return f"{backend.get_name()} with {why}"
    divides = getattr(backend, "get_supported_kernel_block_sizes", None)
    if divides is None:  # in old versions none does
        return None
    sizes, tokens = divides(), spec.block_size
    if any(tokens % getattr(size, "base", tokens + 1) == 0 or tokens == size for size in sizes):
        return None
    return f"{backend.get_name()}, which divides blocks of {tokens} tokens for its kernels"


def _specs_by_layer(group: Any) -> Iterator[tuple[str, Any]]:
    several = getattr(group.kv_cache_spec, "kv_cache_specs", None)
    if several is not None:
        yield from several.items()
    else:
        (spec,) = layer_specs(group.kv_cache_spec)
        yield from ((name, spec) for name in group.layer_names)
