"""A start-up file of Python's: lets SGLang run on a GPU without its kernels' package.

Whatever SGLang has a kernel of its own for it computes in plain torch, as it can do itself
(``forward_native``); its attention is Triton's. This is for comparing outputs with and without
kvcached, on the very same footing, and says nothing about SGLang's speed.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

STAND_INS = (
    *("sgl_kernel", "flashinfer", "torchao"),  # what it computes with
    *("llguidance", "outlines", "openai_harmony"),  # grammars, formats of answers
    *("IPython", "soundfile", "datasets", "zstandard"),
)


def module(name: str) -> Any:
    return importlib.import_module(name)


def compute_natively() -> None:
    operation = module("sglang.srt.layers.utils.multi_platform").MultiPlatformOp
    operation.dispatch_forward = lambda self: self.forward_native
    for name in ("sglang.jit_kernel.kvcache", "sglang.srt.mem_cache.memory_pool"):
        module(name).can_use_store_cache = lambda size: False


def allow_gpus() -> None:
    """kvcached refuses SGLang on GPUs until it was seen to work: that is what is tried here."""
    module("sglang.srt.managers.scheduler")  # with it kvcached takes hold, and loads its adapter
    module("kvcached.engines.sglang.v0_5_15").PLATFORMS = ("cpu", "cuda")


if os.environ.get("SGLANG_WITHOUT_KERNELS"):
    module("sglang_stand_ins").stand_in(*STAND_INS)
    compute_natively()
    if os.environ.get("ENABLE_KVCACHED"):
        allow_gpus()
