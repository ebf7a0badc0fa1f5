"""The adapter of the vLLM that runs here.

An adapter is a module, named in the registry, that holds what differs between versions:

- ``seams(config)``: what is replaced in vLLM's own code.
- ``tensors``: a module with ``block_bytes(kv_cache_config)`` and
  ``block_outermost(kv_cache_config)``, which read and rewrite where the KV cache's tensors lie, and
  ``refusal(backend)``, which says whether an attention backend takes them so.
- ``PLATFORMS``: those of vLLM's platforms on which it was seen to work.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import vllm

from kvcached.engines import registry


def name() -> str:
    """The adapter module's name; raises UnsupportedEngineError for a version without one."""
    return registry.find("vllm", vllm.__version__)


def current() -> ModuleType:
    """The adapter module."""
    return importlib.import_module(name())
