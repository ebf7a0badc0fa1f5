"""Stand-ins for packages that SGLang imports and that exist for GPUs only. Tests only.

SGLang imports its CUDA kernels' packages on every platform, and uses none of them on a CPU with
``torch_native`` attention. A stand-in lets such an import pass; whoever calls what it names gets an
error, so nothing is computed by it. Installed packages come first: this finder is asked last.

The set-up script puts ``import sglang_stand_ins; sglang_stand_ins.stand_in(...)`` into a start-up
file of the environments that it builds for SGLang, with the names that the version needs.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ClassVar

# Where SGLang asks by importing whether something is there, the honest answer is no.
ABSENT = ("sgl_kernel.scalar_type", "vllm.model_executor.layers.quantization", "vllm.logger")

# Layers of vLLM's that SGLang 0.4 computes with on a CPU: these are real (``sglang_layers.py``).
LAYERS = ("RMSNorm", "GemmaRMSNorm", "SiluAndMul", "GeluAndMul")


class _Anything(type):
    """A class any attribute of which is its own name: enough for tables that are never used."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _StandIn(ModuleType):
    __path__: ClassVar[list[str]] = []
    __version__ = "0.0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        full = f"{self.__name__}.{name}"
        if full in sys.modules:
            return sys.modules[full]
        made: Any
        if full.startswith("vllm.") and name in LAYERS:
            made = getattr(importlib.import_module("sglang_layers"), name)
        elif name == "scalar_types" or name[:1].isupper():
            made = _Anything(name, (), {"__module__": self.__name__})
        else:
            made = _refusing(full)
        setattr(self, name, made)
        return made


def _refusing(full: str) -> Any:
    def call(*_: Any, **__: Any) -> Any:
        raise RuntimeError(f"{full} was called, which has no stand-in")

    call.__name__ = full.rpartition(".")[2]
    return call


class _Finder(MetaPathFinder, Loader):
    def __init__(self, names: Sequence[str]) -> None:
        self.names = frozenset(names)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] not in self.names or name.startswith(ABSENT):
            return None
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Early(MetaPathFinder):
    """Asked first, to see SGLang coming; finds nothing."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        if name == "sglang":
            _add_to_torch()


def _add_to_torch() -> None:
    """A question that SGLang asks of torch, and that this build of it does not know."""
    import torch

    if not hasattr(torch._C._cpu, "_is_amx_tile_supported"):
        torch._C._cpu._is_amx_tile_supported = lambda: False  # type: ignore[attr-defined]


def stand_in(*names: str) -> None:
    """Lets imports of these packages, and of what is in them, pass in this process."""
    sys.meta_path.append(_Finder(names))
    sys.meta_path.insert(0, _Early())
