"""Elastic subclasses of whatever worker or scheduler class vLLM resolved.

vLLM names both classes by strings that its processes import. A name made here carries the base
class (colons for its dots), so the same name means the same class in every process, for vLLM's
own classes and for a user's.
"""

from __future__ import annotations

import importlib
from typing import Any

from kvcached.config import Config
from kvcached.engines.vllm import install, selftest

_PREFIX = "Elastic:"


def qualified_name(kind: str, base: str | type) -> str:
    """The importable name of the elastic subclass of ``base`` (``kind``: worker or scheduler)."""
    if isinstance(base, type):
        base = f"{base.__module__}.{base.__qualname__}"
    return f"{__name__}.{_PREFIX}{kind}:{base.replace('.', ':')}"


def __getattr__(name: str) -> Any:
    if not name.startswith(_PREFIX):
        raise AttributeError(name)
    kind, _, encoded = name.removeprefix(_PREFIX).partition(":")
    module, _, base_name = encoded.replace(":", ".").rpartition(".")
    base = getattr(importlib.import_module(module), base_name)
    # Also here: not every process of every version loads plugins (an EngineCore of 0.8 does not).
    install.install(Config.from_env())
    selftest.check_base(kind, base)
    made = importlib.import_module(f"kvcached.engines.vllm.{kind}").elastic(base)
    globals()[name] = made
    return made
