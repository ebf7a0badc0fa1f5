"""The seams that kvcached takes in vLLM (0.24, 0.32)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.core import EngineCore, EngineCoreProc
from vllm.v1.engine.input_processor import InputProcessor

from kvcached.config import Config
from kvcached.engines.base import Seam
from kvcached.engines.vllm import front


def _attach_when_built(original: Any) -> Any:
    """For an engine in its caller's process, where kvcached is installed before it is built."""

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        from kvcached.engines.vllm import idle

        original(self, *args, **kwargs)
        if not isinstance(self, EngineCoreProc):
            idle.attach(self)

    return __init__


def _attach_when_run(original: Any) -> Any:
    """For an engine in a process of its own. If that process was spawned, it loads plugins inside
    the constructor, which is too late to replace the constructor; the loop comes after it.
    """

    @functools.wraps(original)
    def run_busy_loop(self: Any) -> Any:
        from kvcached.engines.vllm import idle

        idle.attach(self)
        return original(self)

    return run_busy_loop


def seams(config: Config) -> Sequence[Seam]:
    """Everything that is replaced in vLLM's own code; the rest are subclasses."""
    return (
        Seam(EngineArgs, "create_engine_config", front.wrap_create_engine_config(config)),
        Seam(InputProcessor, "process_inputs", front.wrap_process_inputs(config)),
        Seam(EngineCore, "__init__", _attach_when_built),
        Seam(EngineCoreProc, "run_busy_loop", _attach_when_run),
    )
