"""The adapter of the vLLM that runs here.

An adapter is a module, named in the registry, that holds what differs between versions:

- ``seams()``: what is replaced in vLLM's own code.
- ``expects``: a module with the signatures and attributes that the rest counts on (``selftest``).
- ``scheduling``: a module that knows vLLM's bookkeeping of blocks and of failed requests.
- ``tensors``: a module that reads and rewrites where the KV cache's tensors lie: ``block_bytes``,
  ``is_packed`` and ``runs`` of a ``KVCacheConfig``, the copies ``block_outermost`` and
  ``layer_outermost``, and the ``allocations`` that vLLM makes for it. ``refusal`` and ``planes``
  ask an attention backend what it takes, ``BACKENDS`` names those that were seen to be right.
  Where blocks can lie in runs, one for each group of layers, also ``groups`` and ``grouped``.
- ``used_backends(worker)``: the attention backend of each layer of a loaded model.
- ``new_blocks(scheduler_output)``: the blocks that a step brings in.
- ``PLATFORMS``: those of vLLM's platforms on which it was seen to work.
- ``SLEEPS``: whether its sleep mode does, on a GPU.
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
