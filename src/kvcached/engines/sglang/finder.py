"""Waits for SGLang's modules to be imported: the way in where there are no plugins.

The start-up file ``kvcached.pth`` imports this module in every Python program that starts with
``ENABLE_KVCACHED`` set, and in no other. Only the standard library is imported until SGLang's
own modules are; a program that does not import them has one more finder to ask, which says no to
every name but theirs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

SCHEDULER = "sglang.srt.managers.scheduler"
DETOKENIZER = "sglang.srt.managers.detokenizer_manager"
SERVER = "sglang.srt.entrypoints.http_server"
WAITED_FOR = (SCHEDULER, DETOKENIZER, SERVER)


class _HoldingLoader(Loader):
    """Runs a module as its own loader does, and takes hold of it then."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        from kvcached.engines.sglang import plugin

        if module.__spec__ is not None:  # from here on it is as if this loader had not been
            module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        plugin.take_hold((module.__name__,))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # what runpy and others ask of a loader


class SglangFinder(MetaPathFinder):
    """Finds the modules that are waited for where they are, with another loader."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in WAITED_FOR:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _HoldingLoader(spec.loader)
        return spec


def wait() -> None:
    """Puts the finder in place; a second call changes nothing."""
    if not any(isinstance(each, SglangFinder) for each in sys.meta_path):
        sys.meta_path.insert(0, SglangFinder())


def loaded() -> tuple[str, ...]:
    """Those of the modules that are imported completely."""
    found = []
    for name in WAITED_FOR:
        spec = getattr(sys.modules.get(name), "__spec__", None)
        if spec is not None and not getattr(spec, "_initializing", False):
            found.append(name)
    return tuple(found)
