"""``kvcached bench scale``: what operations cost as blocks, instances and pages grow by a thousand.

Times are medians in microseconds an operation, on real allocators, ledgers and arenas. A ledger has
rows for 64 instances; the policy's arithmetic alone is measured for a thousand.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvcached.bench.alloc import core
from kvcached.bench.vmm import open_backend
from kvcached.ledger import Ledger
from kvcached.policy import Standing, fair_shares, target
from kvcached.units import MIB
from kvcached.vmm_ops import Arena, Backend

BLOCKS = (1 << 13, 1 << 18, 1 << 23)
INSTANCES = (1, 8, 64)
STANDINGS = (1, 10, 100, 1000)
PAGE_FACTORS = (1, 32, 1024)
LEDGER_PAGE = 2 * MIB
_now = time.perf_counter_ns


def run(backend_name: str, page_bytes: int, rounds: int) -> dict[str, Any]:
    """All figures. ``page_bytes`` is the smallest page; the largest is 1024 times that."""
    backend = open_backend(backend_name)
    smallest = max(page_bytes, backend.granularity)
    return {
        "benchmark": "scale",
        "backend": backend_name,
        "rounds": rounds,
        "blocks": {size: core(size, rounds) for size in BLOCKS},
        "instances": {count: ledger_costs(count, rounds) for count in INSTANCES},
        "standings": {count: policy_costs(count, rounds) for count in STANDINGS},
        "pages": {
            size: page_costs(backend, size, rounds)
            for size in (smallest * factor for factor in PAGE_FACTORS)
        },
    }


def ledger_costs(instances: int, rounds: int) -> dict[str, float]:
    """What one of so many instances pays, and what a tool pays that looks at all of them."""
    with (
        tempfile.TemporaryDirectory(prefix="kvcached-scale-") as folder,
        Ledger.open(Path(folder) / "ledger", "host:scale", 4 * instances * LEDGER_PAGE) as ledger,
    ):
        accounts = []
        for number in range(instances):
            account = ledger.join(f"i{number}", f"i{number}")
            account.lease(2 * LEDGER_PAGE)
            account.publish(LEDGER_PAGE, 0, LEDGER_PAGE)
            accounts.append(account)
        account = accounts[-1]

        def lease() -> None:
            account.lease(LEDGER_PAGE)
            account.give_back(LEDGER_PAGE)

        costs = {
            "lease_and_give_back_us": median_us(lease, rounds),
            "publish_us": median_us(lambda: account.publish(LEDGER_PAGE, 0, 0), rounds),
            "pressed_us": median_us(account.pressed, rounds),
            "snapshot_us": median_us(ledger.snapshot, max(1, rounds // 10)),
        }
        accounts[0].set_demand(LEDGER_PAGE)
        costs["plan_us"] = median_us(lambda: account.target(LEDGER_PAGE), max(1, rounds // 10))
        for each in accounts:
            each.close()
    return costs


def policy_costs(count: int, rounds: int) -> dict[str, float]:
    """The arithmetic for so many accounts, half of which wait for memory that is short."""
    page = LEDGER_PAGE
    standings = [
        Standing(
            guarantee=page,
            charge=(2 + i % 7) * page,
            in_use=(1 + i % 5) * page,
            cached=page,
            demand=4 * page if i % 2 else 0,
            page=page,
            working=True,
        )
        for i in range(count)
    ]
    lendable = sum(each.charge for each in standings)
    repeats = max(3, rounds // count)
    return {
        "fair_shares_us": median_us(lambda: fair_shares(lendable, standings), repeats),
        "target_us": median_us(lambda: target(lendable, standings, 0), repeats),
    }


def page_costs(backend: Backend, page_bytes: int, rounds: int) -> dict[str, float]:
    """One page in and out of an arena, with a new handle each time."""
    arena = Arena(backend, [(0, page_bytes)], 1, page_bytes, 0)
    times_in, times_out = [], []
    for _ in range(max(5, min(rounds, 1024 * MIB // page_bytes))):
        start = _now()
        arena.map([0])
        mapped = _now()
        arena.unmap([0])
        times_out.append((_now() - mapped) / 1000)
        times_in.append((mapped - start) / 1000)
    return {
        "page_in_us": round(statistics.median(times_in), 3),
        "page_out_us": round(statistics.median(times_out), 3),
    }


def median_us(call: Callable[[], object], rounds: int, at_once: int = 16) -> float:
    """The median over rounds of so many calls each; the loop that calls is left in."""
    times = []
    for _ in range(rounds):
        start = _now()
        for _ in range(at_once):
            call()
        times.append((_now() - start) / 1000 / at_once)
    return round(statistics.median(times), 4)


def growth(figures: dict[int, dict[str, float]]) -> dict[str, float]:
    """By operation: what it costs at the largest size over what it costs at the smallest."""
    first, last = figures[min(figures)], figures[max(figures)]
    return {key: round(last[key] / first[key], 2) for key in first if first[key]}
