"""The adapter of the SGLang that runs here.

An adapter is a module, named in the registry, that holds what differs between versions:

- ``seams(config)``: what is replaced in SGLang's own code.
- ``arguments(server_args)``: SGLang's settings as they are in effect, by name.
- ``Cache``: what kvcached asks of the scheduler's prefix cache and of its requests
  (``slots.PrefixCache``).
- ``EXPECTS``: the parameters of SGLang's functions that the rest counts on (``selftest``).
- ``PLATFORMS``: the devices (``--device``) on which it was seen to work.
- ``stream(scheduler)``, where a GPU may be among them: the handle of the stream of its steps.
- ``TOGETHER``: attention backends that were seen to give right outputs where all layers of a slot
  lie together.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from kvcached.engines import registry
from kvcached.errors import EngineError


def running_version() -> str:
    """The version of SGLang. Raises EngineError where it is not installed as a distribution."""
    try:
        return version("sglang")
    except PackageNotFoundError:
        raise EngineError(
            "kvcached is switched on, but the version of this sglang cannot be told: it is not "
            f"installed as a distribution. {registry.OFF}"
        ) from None


def name() -> str:
    """The adapter module's name; raises UnsupportedEngineError for a version without one."""
    return registry.find("sglang", running_version())


def current() -> ModuleType:
    """The adapter module."""
    return importlib.import_module(name())
