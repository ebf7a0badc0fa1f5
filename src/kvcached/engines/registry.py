"""Which adapter serves which version of which engine: data, and the look-up."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from kvcached.errors import EngineError, UnsupportedEngineError

OFF = "Unset ENABLE_KVCACHED to run the engine without kvcached."


@dataclass(frozen=True, slots=True)
class Support:
    """Versions of an engine, and the adapter module that fits them."""

    engine: str
    versions: SpecifierSet
    module: str


SUPPORTED = (
    Support("vllm", SpecifierSet("==0.8.4"), "kvcached.engines.vllm.v0_8"),
    Support("vllm", SpecifierSet("~=0.13.0"), "kvcached.engines.vllm.v0_13"),
    Support("vllm", SpecifierSet("==0.19.1"), "kvcached.engines.vllm.v0_19"),
    Support("vllm", SpecifierSet("~=0.24.0"), "kvcached.engines.vllm.v0_24"),
    Support("vllm", SpecifierSet("~=0.26.0"), "kvcached.engines.vllm.v0_26"),
    Support("vllm", SpecifierSet("~=0.32.0"), "kvcached.engines.vllm.v0_32"),
    Support("sglang", SpecifierSet("==0.4.6.*"), "kvcached.engines.sglang.v0_4_6"),
    Support("sglang", SpecifierSet("==0.4.9"), "kvcached.engines.sglang.v0_4_9"),
    Support("sglang", SpecifierSet("==0.5.10"), "kvcached.engines.sglang.v0_5_10"),
    Support("sglang", SpecifierSet("==0.5.15"), "kvcached.engines.sglang.v0_5_15"),
    Support("sglang", SpecifierSet("==0.5.23"), "kvcached.engines.sglang.v0_5_23"),
)


def find(engine: str, version: str) -> str:
    """The adapter module for a version; raises UnsupportedEngineError naming what is supported."""
    # A local label such as +cpu says how it was built, not what its code is.
    release = Version(version).public
    for support in SUPPORTED:
        if support.engine == engine and support.versions.contains(release, prereleases=True):
            return support.module
    raise UnsupportedEngineError(
        f"kvcached is switched on, but {engine} {version} is not supported; "
        f"supported: {supported(engine)}. {OFF}"
    )


def load(engine: str, version: str) -> ModuleType:
    """The adapter of a version, imported after the core: what either lacks ends the installation.

    Raises UnsupportedEngineError for a version without an adapter, EngineError where the core or
    the adapter cannot be imported.
    """
    name = find(engine, version)
    on = f"kvcached is switched on for {engine} {version}"
    versions = f"Supported versions: {supported(engine)}."
    try:
        importlib.import_module("kvcached.vmm_ops")
    except ImportError as error:
        raise EngineError(
            f"{on}, but its core library does not load: {error}. {versions} Build it for this "
            f"Python with `python setup.py build_ext --inplace`. {OFF}"
        ) from error
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise EngineError(f"{on}, but a seam is missing: {error}. {versions} {OFF}") from error


def supported(engine: str) -> str:
    """The supported versions of an engine, in words."""
    return ", ".join(str(s.versions) for s in SUPPORTED if s.engine == engine)
