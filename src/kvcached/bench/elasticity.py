"""``kvcached bench elasticity``: how fast a KV cache grows and shrinks, and what it keeps at rest.

One whole instance in this process: blocks, page pool, ledger, the thread that maps. Growing lasts
until the blocks may be written, shrinking until the ledger may lend the bytes to others.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from kvcached.bench.vmm import open_backend
from kvcached.cache import ElasticCache
from kvcached.errors import KvcachedError
from kvcached.layout import BlockLayout
from kvcached.ledger import Ledger
from kvcached.units import GIB, round_up

BLOCKS_PER_PAGE = 16
LIMIT_S = 30.0
PAUSE_S = 0.0005
"""Between two looks at the ledger while it shrinks: what the figure may be too large by."""


class ElasticityError(KvcachedError):
    """The cache did not do what was asked of it."""


def run(backend_name: str, page_bytes: int, pages: int, rounds: int) -> dict[str, Any]:
    """Grows to so many pages and back, ``rounds`` times. Raises ElasticityError where the cache
    refuses blocks, or does not give them back within 30 s.
    """
    backend = open_backend(backend_name)
    page_bytes = round_up(page_bytes, backend.granularity * BLOCKS_PER_PAGE)
    layout = BlockLayout.block_outermost(
        (pages + 8) * BLOCKS_PER_PAGE,
        page_bytes // BLOCKS_PER_PAGE,
        BLOCKS_PER_PAGE,
        backend.granularity,
    )
    # One is held already, with block 0 on it; a few may be warm.
    capacity = (pages + 8) * page_bytes
    name = f"elasticity-{os.getpid()}"
    times: dict[str, list[float]] = {"grow": [], "one": [], "shrink": []}
    with (
        tempfile.TemporaryDirectory(prefix="kvcached-elasticity-") as folder,
        Ledger.open(Path(folder) / "ledger", f"host:{name}", capacity) as ledger,
    ):
        start = time.perf_counter()
        cache = ElasticCache(ledger, backend, layout, instance=name, name=name)
        open_s = time.perf_counter() - start
        rest = _settled(ledger, cache)
        for _ in range(rounds):
            start = time.perf_counter()
            ids = _blocks(cache, BLOCKS_PER_PAGE - 1)
            times["one"].append(time.perf_counter() - start)
            start = time.perf_counter()
            ids += _blocks(cache, (pages - 1) * BLOCKS_PER_PAGE)
            times["grow"].append(time.perf_counter() - start)
            start = time.perf_counter()
            cache.free(ids)
            while ledger.snapshot().charge > rest:
                if time.perf_counter() - start > LIMIT_S:
                    raise ElasticityError(f"not given back within {LIMIT_S:g} s")
                time.sleep(PAUSE_S)
            times["shrink"].append(time.perf_counter() - start)
        cache.close()
    medians = {key: statistics.median(values) for key, values in times.items()}
    size = pages * page_bytes
    return {
        "benchmark": "elasticity",
        "backend": backend_name,
        "page_bytes": page_bytes,
        "pages": pages,
        "rounds": rounds,
        "open_ms": round(1e3 * open_s, 3),
        "grow_ms": round(1e3 * medians["grow"], 3),
        "grow_slowest_ms": round(1e3 * max(times["grow"]), 3),
        "grow_gib_per_s": round((size - page_bytes) / GIB / medians["grow"], 2),
        "shrink_ms": round(1e3 * medians["shrink"], 3),
        "shrink_slowest_ms": round(1e3 * max(times["shrink"]), 3),
        "shrink_gib_per_s": round(size / GIB / medians["shrink"], 2),
        "first_blocks_ms": round(1e3 * medians["one"], 3),
        "rest_bytes": rest,
        "rest_pages": rest // page_bytes,
    }


def _blocks(cache: ElasticCache, count: int) -> list[int]:
    ids = cache.alloc(count)
    if ids is None:
        raise ElasticityError(f"no memory for {count} blocks")
    return ids


def _settled(ledger: Ledger, cache: ElasticCache) -> int:
    """What the instance holds at rest: one round first, since nothing is warm before."""
    cache.free(_blocks(cache, BLOCKS_PER_PAGE))
    charge, since = ledger.snapshot().charge, time.perf_counter()
    while time.perf_counter() - since < 0.1:
        time.sleep(PAUSE_S)
        now = ledger.snapshot().charge
        if now != charge:
            charge, since = now, time.perf_counter()
    return charge
