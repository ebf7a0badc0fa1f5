"""``kvcached bench alloc``: what a block costs, in our core and in an engine's own pool.

Times are medians over rounds, in microseconds an operation, with the loop that calls it left in.
Two pools that are compared take turns in one run, so that a machine that drifts drifts for both.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from kvcached.ledger import Account, Ledger
from kvcached.pages import PagePool
from kvcached.vmm_ops import Blocks

BLOCKS_PER_PAGE = 16
PAGE_BYTES = 1 << 21
SINGLES = 256
_now = time.perf_counter_ns


def run(num_blocks: int = 1 << 16, rounds: int = 200) -> dict[str, Any]:
    """All figures of the benchmark, by key; sizes in blocks, times in microseconds."""
    result: dict[str, Any] = {"num_blocks": num_blocks, "rounds": rounds}
    result.update(core(num_blocks, rounds))
    result["by_num_blocks"] = {
        size: core(size, max(20, rounds // 4)) for size in (1 << 10, 1 << 13, 1 << 16, 1 << 20)
    }
    if importlib.util.find_spec("vllm") is not None:
        result.update(vllm_pools(num_blocks, rounds))
    return result


def core(num_blocks: int, rounds: int) -> dict[str, float]:
    """Our allocator alone, warm: all its pages present."""
    blocks = Blocks(num_blocks, BLOCKS_PER_PAGE)
    blocks.grow(blocks.num_pages)
    many = min(4096, num_blocks // 2)
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        held: list[Any] = []
        _time(times, "alloc1_warm_us", SINGLES, partial(_append, held, blocks.alloc, 1))
        singles = iter(held)
        _time(times, "free1_warm_us", SINGLES, partial(_use_next, blocks.free, singles))
        batch: list[Any] = []
        _time(times, "alloc4096_warm_us", 1, partial(_append, batch, blocks.alloc, many))
        _time(times, "free4096_warm_us", 1, partial(_use_next, blocks.free, iter(batch)))
        _time(times, "available_us", SINGLES, blocks.available)
    return _medians(times)


def vllm_pools(num_blocks: int, rounds: int) -> dict[str, float]:
    """The pool that the adapter installs and vLLM's own BlockPool, turn by turn."""
    from vllm.v1.core.block_pool import BlockPool

    from kvcached.engines.vllm.pool import ElasticBlockPool

    arguments = {"num_gpu_blocks": num_blocks, "enable_caching": True, "hash_block_size": 16}
    times: dict[str, list[float]] = {}
    with _account(num_blocks) as account:
        elastic = ElasticBlockPool(**arguments)
        pages = PagePool(
            Blocks(num_blocks, BLOCKS_PER_PAGE),
            account,
            PAGE_BYTES,
            warm_low=0,
            warm_high=num_blocks,
            on_evict=elastic.forget,
        )
        elastic.bind(pages)
        pages.ensure(num_blocks - 1)
        plain = BlockPool(**arguments)
        for index in range(rounds):
            pair = [("", elastic), ("vllm_", plain)]
            for prefix, pool in pair if index % 2 else reversed(pair):
                _round(times, prefix, pool)
    return _medians(times)


def _append(results: list[Any], operation: Callable[[int], Any], count: int) -> None:
    results.append(operation(count))


def _use_next(operation: Callable[[Any], Any], values: Iterator[Any]) -> None:
    operation(next(values))


def _round(times: dict[str, list[float]], prefix: str, pool: Any) -> None:
    held: list[Any] = []
    _time(times, f"{prefix}pool_alloc1_us", SINGLES, partial(_append, held, pool.get_new_blocks, 1))
    singles = iter(held)
    _time(times, f"{prefix}pool_free1_us", SINGLES, partial(_use_next, pool.free_blocks, singles))
    batches: list[Any] = []
    _time(
        times, f"{prefix}pool_alloc256_us", 8, partial(_append, batches, pool.get_new_blocks, 256)
    )
    several = iter(batches)
    _time(times, f"{prefix}pool_free256_us", 8, partial(_use_next, pool.free_blocks, several))
    _time(times, f"{prefix}pool_num_free_us", SINGLES, pool.get_num_free_blocks)


def _time(
    times: dict[str, list[float]], key: str, count: int, operation: Callable[[], Any]
) -> None:
    steps = range(count)
    start = _now()
    for _ in steps:
        operation()
    times.setdefault(key, []).append((_now() - start) / count / 1000)


def _medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {key: round(statistics.median(values), 4) for key, values in times.items()}


@contextmanager
def _account(num_blocks: int) -> Iterator[Account]:
    with tempfile.TemporaryDirectory(prefix="kvcached-bench-") as directory:
        ledger = Ledger.open(
            Path(directory) / "ledger", "host:bench", capacity_bytes=num_blocks * PAGE_BYTES
        )
        account = ledger.join("0" * 32, "bench", pinned_bytes=PAGE_BYTES)
        yield account
        account.close()
        ledger.close()
