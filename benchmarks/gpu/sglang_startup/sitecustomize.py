"""A start-up file of Python's: lets SGLang run on a GPU without its kernels' package.

Whatever SGLang has a kernel of its own for it computes in plain torch, as it can do itself
(``forward_native``); its attention is Triton's. This is for comparing outputs with and without
kvcached, on the very same footing, and says nothing about SGLang's speed.
"""

from __future__ import annotations

import importlib
import os
import traceback
from typing import Any

STAND_INS = (
    *("sgl_kernel", "flashinfer", "torchao"),  # what it computes with
    *("llguidance", "outlines", "openai_harmony"),  # grammars, formats of answers
    *("IPython", "soundfile", "datasets", "zstandard"),
)


def module(name: str) -> Any:
    return importlib.import_module(name)


def compute_natively() -> None:
    # Asked when Triton's attention is set up: whether one kernel may start before another ends.
    module("sgl_kernel.utils").is_arch_support_pdl = lambda: False
    operation = module("sglang.srt.layers.utils.multi_platform").MultiPlatformOp
    operation.dispatch_forward = lambda self: self.forward_native
    for name in ("sglang.jit_kernel.kvcache", "sglang.srt.mem_cache.memory_pool"):
        module(name).can_use_store_cache = lambda size: False
    forward = module("sglang.srt.model_executor.forward_batch_info")
    forward.clamp_position = forward._clamp_position_native


def start() -> None:
    module("sglang_stand_ins").stand_in(*STAND_INS)
    compute_natively()


if os.environ.get("SGLANG_WITHOUT_KERNELS"):
    try:
        start()
    except Exception:  # noqa: BLE001 - Python would go on without what is missing here
        traceback.print_exc()
        os._exit(70)
