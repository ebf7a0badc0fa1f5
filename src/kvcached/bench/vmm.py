"""``kvcached bench vmm``: what a page costs through our arena, beside the bare driver calls.

Times are medians, in microseconds a page. The bare calls run in a loop of the core (map and make
accessible; unmap; with a new handle also create and release); the arena is called from Python, as
an engine's process calls it. The two take turns, so that a machine that drifts drifts for both.
"""

from __future__ import annotations

import math
import os
import re
import statistics
import time
from typing import Any

from kvcached.errors import ConfigError
from kvcached.layout import BlockLayout
from kvcached.processes import resident_bytes
from kvcached.units import GIB, MIB, ceil_div, round_up
from kvcached.vmm_ops import Arena, Backend, cuda_backend, host_backend, time_bare_pages

TURN = 20  # pages in and out before the other side has its turn
OPEN_BYTES, OPEN_PAGE_BYTES = 64 * GIB, 32 * MIB
# Llama-3-8B: layers, K and V, tokens of a block, KV heads, size of a head; 2 bytes a number.
LAYERS, SHAPE = 32, (2, 16, 8, 128)
_now = time.perf_counter_ns


def run(backend_name: str, page_bytes: int, rounds: int) -> dict[str, Any]:
    """All figures of the benchmark, by key; units stand last in the keys."""
    backend = open_backend(backend_name)
    page_bytes = round_up(page_bytes, backend.granularity)
    result: dict[str, Any] = {
        "backend": backend_name,
        "page_bytes": page_bytes,
        "rounds": rounds,
    }
    result.update(pages(backend, page_bytes, rounds))
    result.update(opening(backend))
    return result


def open_backend(name: str) -> Backend:
    """``host`` or ``cuda:N``. Raises ConfigError for another name, UnavailableError without one."""
    if name == "host":
        return host_backend("bench")
    if found := re.fullmatch(r"cuda:(\d{1,3})", name):
        return cuda_backend(int(found[1]))
    raise ConfigError(f"--backend={name!r} is not allowed: expected host or cuda:N")


def pages(backend: Backend, page_bytes: int, rounds: int) -> dict[str, float]:
    """One page in and out: with a handle that is kept, and with a new one each time."""
    result: dict[str, float] = {}
    for suffix, keep in (("kept", True), ("new", False)):
        arena = Arena(backend, [(0, page_bytes)], 1, page_bytes, page_bytes if keep else 0)
        _through_arena(arena, 3)  # what only the first calls cost
        sides: tuple[list[float], ...] = ([], [], [], [])
        for _ in range(ceil_div(rounds, TURN)):
            ours = _through_arena(arena, TURN)
            bare = time_bare_pages(backend, page_bytes, TURN, keep)
            for times, more in zip(sides, (*ours, *bare), strict=True):
                times += more
        page_in, page_out, bare_in, bare_out = (statistics.median(times) for times in sides)
        result |= {
            f"page_in_{suffix}_us": round(page_in, 3),
            f"bare_in_{suffix}_us": round(bare_in, 3),
            f"page_in_{suffix}_ratio": round(page_in / bare_in, 3),
            f"page_out_{suffix}_us": round(page_out, 3),
            f"bare_out_{suffix}_us": round(bare_out, 3),
            f"page_out_{suffix}_ratio": round(page_out / bare_out, 3),
        }
    return result


def _through_arena(arena: Arena, rounds: int) -> tuple[list[float], list[float]]:
    times_in, times_out, page = [], [], [0]
    for _ in range(rounds):
        start = _now()
        arena.map(page)
        mapped = _now()
        arena.unmap(page)
        end = _now()
        times_in.append((mapped - start) / 1000)
        times_out.append((end - mapped) / 1000)
    return times_in, times_out


def opening(backend: Backend) -> dict[str, float]:
    """An arena of 64 GiB of addresses with a tensor for each layer: time, and host memory."""
    import torch

    from kvcached.views import block_view, int8_tensor

    layer_bytes = 2 * math.prod(SHAPE)
    block_bytes = LAYERS * layer_bytes
    layout = BlockLayout.block_outermost(
        OPEN_BYTES // block_bytes, block_bytes, OPEN_PAGE_BYTES // block_bytes, backend.granularity
    )
    if backend.kind == "cuda":
        torch.zeros(1, device="cuda")  # torch's own start is an engine's affair
    before, start = resident_bytes(os.getpid()), _now()
    arena = Arena(backend, layout.arena_regions(), layout.num_pages, layout.size_bytes)
    buffer = int8_tensor(arena)
    views = [
        block_view(buffer, layout, torch.bfloat16, SHAPE, inner_offset_bytes=layer * layer_bytes)
        for layer in range(LAYERS)
    ]
    taken = _now() - start
    grown = resident_bytes(os.getpid()) - before
    assert len(views) == LAYERS and views[0].shape == (layout.num_blocks, *SHAPE)
    return {
        "arena_open_64gib_ms": round(taken / 1e6, 3),
        "arena_open_host_mib": round(grown / MIB, 3),
    }
