"""vLLM 0.32: the seams that kvcached takes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.input_processor import InputProcessor

from kvcached.config import Config
from kvcached.engines.base import Seam
from kvcached.engines.vllm import front


def _attach_when_built(original: Any) -> Any:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        from kvcached.engines.vllm import idle

        original(self, *args, **kwargs)
        idle.attach(self)

    return __init__


def seams(config: Config) -> Sequence[Seam]:
    """Everything that is replaced in vLLM's own code; the rest are subclasses."""
    return (
        Seam(EngineArgs, "create_engine_config", front.wrap_create_engine_config(config)),
        Seam(InputProcessor, "process_inputs", front.wrap_process_inputs(config)),
        Seam(EngineCore, "__init__", _attach_when_built),
    )
