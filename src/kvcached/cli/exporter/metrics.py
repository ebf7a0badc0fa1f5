"""The ledgers' numbers as Prometheus metrics. Read when they are scraped; nothing is kept.

Names, units and types follow Prometheus's conventions: base units, ``_total`` for what only grows,
one meaning for each name. Sums over labels make sense: states of memory are labels, sizes that
overlap are metrics of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from kvcached.observe import Observer
from kvcached.snapshot import WAIT_BOUNDS_US, AccountSnapshot, LedgerSnapshot

Number = int | float
DEVICE = ("device",)
INSTANCE = ("device", "instance", "name")

OF_DEVICE: tuple[tuple[str, str, Callable[[LedgerSnapshot], Number]], ...] = (
    ("capacity_bytes", "Memory that the ledger governs, headroom included.", lambda d: d.capacity),
    ("headroom_bytes", "Memory that leases leave alone.", lambda d: d.headroom),
    ("charged_bytes", "Memory charged to all instances.", lambda d: d.charge),
    ("free_bytes", "Memory that nothing holds and nothing keeps; may be below zero.",
     lambda d: d.free),
    ("foreign_bytes", "Memory in use on the device that is nobody's pages.", lambda d: d.foreign),
    ("set_aside_bytes", "Memory kept for starting engines and holds.", lambda d: d.set_aside),
    ("charged_peak_bytes", "The most that was ever charged.", lambda d: d.high_water),
    ("reaps_total", "Owners and members whose rows were cleared after their death.",
     lambda d: d.reaps),
    ("lock_timeouts_total", "Waits for the ledger's lock that ran out.", lambda d: d.lock_timeouts),
    ("locks_stolen_total", "Locks taken from the dead.", lambda d: d.locks_stolen),
)  # fmt: skip

OF_INSTANCE: tuple[tuple[str, str, Callable[[AccountSnapshot], Number | None]], ...] = (
    ("alive", "1 while any process of the instance lives.", lambda a: int(a.alive)),
    ("ready", "1 once the engine serves.", lambda a: int(a.ready and a.alive)),
    ("asleep", "1 while the engine sleeps, without its weights.",
     lambda a: int(a.asleep and a.alive)),
    ("charged_bytes", "Memory that counts against the device's capacity.", lambda a: a.charge),
    ("created_bytes", "Memory that exists for the instance.", lambda a: a.created),
    ("demand_bytes", "Memory wanted that could not be leased.", lambda a: a.demand),
    ("guarantee_bytes", "Memory that is never reclaimed.", lambda a: a.guarantee),
    ("limit_bytes", "The most that it may hold; absent without a limit.", lambda a: a.limit),
    ("ceiling_bytes", "The most that it can hold under today's settings.", lambda a: a.ceiling),
    ("over_limit_bytes", "Memory held above the limit.", lambda a: a.above),
    ("weight_ratio", "Its part of what guarantees leave open.", lambda a: a.weight),
    ("leases_granted_total", "Leases granted.", lambda a: a.granted),
    ("leases_refused_total", "Leases refused for want of memory.", lambda a: a.refused),
    ("lock_timeouts_total", "Leases that failed because the ledger's lock was held.",
     lambda a: a.lock_timeouts),
    ("reclaims_total", "Times that memory was given back because others or an operator wanted it.",
     lambda a: a.reclaims),
    ("reclaimed_bytes_total", "Memory given back because others or an operator wanted it.",
     lambda a: a.reclaimed),
    ("mapped_bytes_total", "Memory of pages that came.", lambda a: a.created_ever),
    ("unmapped_bytes_total", "Memory of pages that went.", lambda a: a.released_ever),
    ("prefix_hit_blocks_total", "Blocks answered from the prefix cache.", lambda a: a.hits),
    ("prefix_miss_blocks_total", "Blocks that had to be computed.", lambda a: a.misses),
)  # fmt: skip


class LedgerCollector(Collector):
    """Looks at the ledgers whenever it is scraped. One scrape at a time: the caller sees to it."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def collect(self) -> Iterator[Metric]:
        """All metrics of all devices."""
        ledgers = self._observer.read()
        yield from _device_metrics(ledgers)
        yield GaugeMetricFamily(
            "kvcached_unreadable_ledgers",
            "Ledgers that could not be read at this scrape.",
            value=len(self._observer.problems),
        )
        rows = [
            ((ledger.device, account.instance, account.name), account)
            for ledger in ledgers
            for account in ledger.accounts
        ]
        for suffix, text, value_of in OF_INSTANCE:
            metric = _family(f"kvcached_instance_{suffix}", text, INSTANCE)
            for labels, account in rows:
                value = value_of(account)
                if value is not None:
                    metric.add_metric(labels, value)
            yield metric
        yield _memory(rows)
        yield _evictions(rows)
        yield _waits(rows)


def _family(name: str, text: str, labels: Iterable[str]) -> GaugeMetricFamily | CounterMetricFamily:
    family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
    return family(name, text, labels=tuple(labels))


def _device_metrics(ledgers: list[LedgerSnapshot]) -> Iterator[Metric]:
    for suffix, text, value_of in OF_DEVICE:
        metric = _family(f"kvcached_device_{suffix}", text, DEVICE)
        for ledger in ledgers:
            metric.add_metric((ledger.device,), value_of(ledger))
        yield metric


Rows = list[tuple[tuple[str, str, str], AccountSnapshot]]


def _memory(rows: Rows) -> Metric:
    text = "Charged memory by what it is used for; the sum is kvcached_instance_charged_bytes."
    metric = GaugeMetricFamily("kvcached_instance_memory_bytes", text, labels=(*INSTANCE, "state"))
    for labels, account in rows:
        states = {"in_use": account.in_use, "cached": account.cached, "warm": account.warm}
        for state, size in states.items():
            metric.add_metric((*labels, state), size)
        # Leased and not mapped yet, on the way out, or created by members before there is an owner.
        metric.add_metric((*labels, "in_transit"), max(0, account.charge - sum(states.values())))
    return metric


def _evictions(rows: Rows) -> Metric:
    text = "Cached blocks lost: to the instance's own use, or because others wanted the memory."
    metric = CounterMetricFamily(
        "kvcached_instance_prefix_evicted_blocks_total", text, labels=(*INSTANCE, "cause")
    )
    for labels, account in rows:
        metric.add_metric((*labels, "own_use"), account.evictions)
        metric.add_metric((*labels, "pressure"), account.evictions_by_pressure)
    return metric


def _waits(rows: Rows) -> Metric:
    text = "How long leases waited for memory to come back, of those that had to wait."
    metric = HistogramMetricFamily("kvcached_instance_lease_wait_seconds", text, labels=INSTANCE)
    for labels, account in rows:
        buckets, total = [], 0
        bounds = [*(f"{us / 1e6:g}" for us in WAIT_BOUNDS_US), "+Inf"]
        for bound, count in zip(bounds, account.wait_buckets, strict=True):
            total += count
            buckets.append((bound, total))
        metric.add_metric(labels, buckets, account.waited_us / 1e6)
    return metric
