"""The seams that kvcached takes in vLLM: each calls a hook (``hooks``) where a patch would."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.core import EngineCore, EngineCoreProc
from vllm.v1.engine.core_client import MPClient

from kvcached.engines.base import Seam
from kvcached.engines.vllm import hooks


def _create_engine_config(original: Any) -> Any:
    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        context = args[0] if args else kwargs.get("usage_context")
        return hooks.configured(original(self, *args, **kwargs), context)

    return create_engine_config


def _process_inputs(original: Any) -> Any:
    @functools.wraps(original)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        return hooks.processed(self.vllm_config, original(self, *args, **kwargs))

    return process_inputs


def _process_outputs(original: Any) -> Any:
    @functools.wraps(original)
    def process_outputs(self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        failed = hooks.answered(self, engine_core_outputs)
        processed = original(self, engine_core_outputs, *args, **kwargs)
        return hooks.gave_up(self, failed, processed)

    return process_outputs


def _init(original: Any) -> Any:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        hooks.built(self)

    return __init__


def _run_busy_loop(original: Any) -> Any:
    @functools.wraps(original)
    def run_busy_loop(self: Any) -> Any:
        hooks.runs(self)
        return original(self)

    return run_busy_loop


def _shutdown(original: Any) -> Any:
    @functools.wraps(original)
    def shutdown(self: Any) -> None:
        original(self)
        hooks.ended(self)

    return shutdown


def common(processor: type) -> Sequence[Seam]:
    """Everything that is replaced in vLLM's own code; the rest are subclasses. ``processor`` is the
    class that turns prompts into requests.
    """
    return (
        Seam(EngineArgs, "create_engine_config", _create_engine_config),
        Seam(processor, "process_inputs", _process_inputs),
        Seam(EngineCore, "__init__", _init),
        Seam(EngineCoreProc, "run_busy_loop", _run_busy_loop),
    )


def usual() -> Sequence[Seam]:
    """The seams of versions since 0.13."""
    from vllm.v1.engine.input_processor import InputProcessor  # older versions have no such module
    from vllm.v1.engine.output_processor import OutputProcessor

    return (
        *common(InputProcessor),
        Seam(OutputProcessor, "process_outputs", _process_outputs),
        Seam(MPClient, "shutdown", _shutdown_client),
    )


def _shutdown_client(original: Any) -> Any:
    @functools.wraps(original)
    def shutdown(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        hooks.left_alone(self)

    return shutdown


def shutdown() -> Seam:
    """For versions whose schedulers are not told that their engine ends."""
    return Seam(EngineCore, "shutdown", _shutdown)
