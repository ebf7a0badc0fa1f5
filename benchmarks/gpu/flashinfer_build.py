#!/usr/bin/env python3
"""Compiles the attention kernels of FlashInfer that the engines of these benchmarks use.

FlashInfer would compile them when an engine starts, a module after the other; here all files of
all modules are compiled at once. They stay under ``FLASHINFER_WORKSPACE_BASE``. Needs nvcc and
ninja, and a GPU or its kind (``FLASHINFER_CUDA_ARCH_LIST=9.0a``).
"""

from __future__ import annotations

import argparse
import time

PREFILL, DECODE = "fa3", "fa2"  # what its wrappers choose on Hopper for 16 bits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-dims", default="64", help="64: the shape 1b, 128: 8b")
    options = parser.parse_args()
    import torch
    from flashinfer.jit import build_jit_specs, gen_batch_prefill_module

    start, kind = time.monotonic(), torch.bfloat16
    specs = [
        gen_batch_prefill_module(
            backend, kind, kind, kind, torch.int32, head_dim, head_dim, 0, False, False, False
        )
        for head_dim in map(int, options.head_dims.split(","))
        for backend in (PREFILL, DECODE)
    ]
    build_jit_specs(specs)
    for spec in specs:
        print(f"{spec.name}: {spec.get_library_path()}")
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
