"""Which vLLM the engine tests run with."""

from __future__ import annotations

import importlib.metadata


def vllm_version() -> str:
    """Of the vLLM that is installed; empty without one."""
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return ""
