"""What the router counts and measures, as Prometheus metrics. One registry for each application.

Labels have few values: configured models, the three endpoints, statuses. What clients send becomes
none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvcached.router.line import Line
from kvcached.router.queues import Gate
from kvcached.router.upstream import State

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
NO_MODEL = ""
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class _Lines(Collector):
    """What is so at this moment, read when it is scraped."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def collect(self) -> Iterator[Metric]:
        """All gauges."""
        of_line: tuple[tuple[str, str, Callable[[Line], float]], ...] = (
            ("waiting_requests", "Requests that wait for their model.", lambda x: len(x.waiting)),
            ("running_requests", "Requests that are with an engine.", lambda x: x.running),
            ("short_of_memory", "1 while the ledger of the model's device is short of memory.",
             lambda x: int(x.name in self._gate.short)),
            ("prefill_estimate_seconds", "What a prompt of 1000 tokens is expected to take.",
             lambda x: x.estimate.seconds(1000)),
        )  # fmt: skip
        for suffix, text, value_of in of_line:
            metric = GaugeMetricFamily(f"kvcached_router_{suffix}", text, labels=("model",))
            for line in self._gate.lines.values():
                metric.add_metric((line.name,), value_of(line))
            yield metric
        metric = GaugeMetricFamily(
            "kvcached_router_model_state",
            "1 for the state in which the model's engine is.",
            labels=("model", "state"),
        )
        for line in self._gate.lines.values():
            for state in State:
                now = int(line.upstream.state is state)
                metric.add_metric((line.name, state.value.replace(" ", "_")), now)
        yield metric


class Metrics:
    """All of them. Called from the event loop."""

    def __init__(self, gate: Gate) -> None:
        registry = self._registry = CollectorRegistry()
        registry.register(_Lines(gate))
        requests = Counter(
            "kvcached_router_requests_total",
            "Requests that are over; status 499: the client went away before there was one.",
            ("model", "endpoint", "status"),
            registry=registry,
        )
        broken = Counter(
            "kvcached_router_broken_answers_total",
            "Answers that had begun when the engine or the client broke off.",
            ("model", "cause"),
            registry=registry,
        )
        retries = Counter(
            "kvcached_router_retries_total",
            "Requests tried again because the engine could not be connected to.",
            ("model",),
            registry=registry,
        )
        self._requests = _children(requests)
        self._broken = _children(broken)
        self._retries = _children(retries)
        since = "Seconds from a request's arrival until "
        self._waits = _children(_histogram(registry, "queue_wait", since + "its engine got it."))
        self._firsts = _children(_histogram(registry, "ttft", since + "a stream's first byte."))
        self._lasts = _children(_histogram(registry, "request", since + "it was over."))

    def over(self, model: str, endpoint: str, status: int, seconds: float) -> None:
        """A request was answered with a status, or was not: 499."""
        self._requests(model, endpoint, status).inc()
        self._lasts(model).observe(seconds)

    def through(self, model: str, seconds: float) -> None:
        """A request waited so long and is with its engine now."""
        self._waits(model).observe(seconds)

    def first(self, model: str, seconds: float) -> None:
        """A stream's first byte came so long after the request."""
        self._firsts(model).observe(seconds)

    def broke(self, model: str, cause: str) -> None:
        """An answer that had begun will not be finished: ``engine``, ``client``, ``stalled``."""
        self._broken(model, cause).inc()

    def retried(self, model: str) -> None:
        """A request is tried again."""
        self._retries(model).inc()

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self._registry)


def _histogram(registry: CollectorRegistry, name: str, text: str) -> Histogram:
    return Histogram(
        f"kvcached_router_{name}_seconds", text, ("model",), buckets=_SECONDS, registry=registry
    )


def _children(family: Counter | Histogram) -> Callable[..., Any]:
    """``family.labels``, remembered: finding a child by its labels is slower than counting."""
    return lru_cache(maxsize=4096)(family.labels)
