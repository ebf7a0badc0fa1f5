"""``kvcached bench share``: who gets the memory when up to 64 instances want it.

Simulated are the time and the engines; the ledger (a real segment file), the policy, the page
pools and the block allocators are those of a real deployment. Deterministic for a seed.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvcached.bench.share_engine import PAGE_BYTES, Engine
from kvcached.bench.share_load import LOADS, Arrival, arrivals, read_trace
from kvcached.config import Share
from kvcached.errors import ConfigError
from kvcached.ledger import Ledger
from kvcached.policy import Standing, fair_shares
from kvcached.units import parse_size

STEP_S = 0.05
"""Simulated seconds of an engine's step."""
SAMPLE_S = 1.0
MAX_INSTANCES = 64
NOTHING = Share()


@dataclass(frozen=True, slots=True)
class InstanceSpec:
    """One simulated instance: its load and what an operator has set for it."""

    load: str
    guarantee: Share = NOTHING
    limit: Share | None = None
    weight: float = 1.0


def parse_instance(text: str) -> InstanceSpec:
    """Reads ``LOAD[:guarantee=SIZE][:limit=SIZE][:weight=NUMBER]``. Raises ConfigError."""
    load, *settings = text.split(":")
    if load not in LOADS:
        raise ConfigError(f"instance {text!r}: the load is one of {', '.join(LOADS)}")
    values: dict[str, Any] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in ("guarantee", "limit", "weight"):
            raise ConfigError(f"instance {text!r}: {key!r} is not guarantee, limit or weight")
        try:
            values[key] = float(value) if key == "weight" else _share(value)
        except ValueError:
            raise ConfigError(f"instance {text!r}: {setting!r} is not a number") from None
    return InstanceSpec(load, **values)


def _share(text: str) -> Share:
    if text.endswith("%"):
        return Share(percent=float(text[:-1]))
    return Share(size_bytes=parse_size(text, "an instance"))


@dataclass(slots=True)
class Record:
    """What is seen of one instance. Sums are over samples."""

    guarantee_bytes: int = 0
    below_guarantee_s: float = 0.0
    samples: int = 0
    in_use: int = 0
    held: int = 0
    contended: int = 0  # samples in which it waited while memory was short
    part_of_share: float = 0.0  # its holdings over its fair share, summed over those


@dataclass(slots=True)
class Simulation:
    """Engines on one ledger; ``run`` plays them. Close the ledger after use."""

    ledger: Ledger
    engines: list[Engine]
    dice: random.Random
    step_s: float = STEP_S
    now: float = 0.0
    records: list[Record] = field(init=False)

    def __post_init__(self) -> None:
        accounts = {a.instance: a for a in self.ledger.snapshot().accounts}
        self.records = [Record(accounts[e.name].guarantee) for e in self.engines]

    def run(self, seconds: float, progress: Callable[[float], None] = lambda _: None) -> None:
        """So many more simulated seconds. ``progress`` hears the time after each sample."""
        steps, sample_every = round(seconds / self.step_s), round(SAMPLE_S / self.step_s)
        first = round(self.now / self.step_s)
        order = self.engines[:]
        for step in range(first + 1, first + steps + 1):
            self.now = step * self.step_s
            self.dice.shuffle(order)  # nobody comes first for ever
            for engine in order:
                if engine.due(self.now):
                    engine.step(self.now)
            self._watch_guarantees()
            if step % sample_every == 0:
                self._sample()
                progress(self.now)

    def _watch_guarantees(self) -> None:
        for engine, record in zip(self.engines, self.records, strict=True):
            if engine.below_guarantee(record.guarantee_bytes):
                record.below_guarantee_s += self.step_s

    def _sample(self) -> None:
        lendable, standings, _ = self.engines[0].account.standings(PAGE_BYTES)
        shares = fair_shares(lendable, standings)
        by_row = dict(zip(self._rows(), zip(standings, shares, strict=True), strict=True))
        for engine, record in zip(self.engines, self.records, strict=True):
            standing, share = by_row[engine.name]
            _note(record, standing, share)

    def _rows(self) -> list[str]:
        return [account.instance for account in self.ledger.snapshot().accounts]


def _note(record: Record, standing: Standing, share: int) -> None:
    record.samples += 1
    record.in_use += standing.in_use
    record.held += standing.held
    if standing.demand > 0:
        record.contended += 1
        record.part_of_share += standing.held / max(1, share)


def run(
    specs: Sequence[InstanceSpec],
    *,
    seconds: float,
    seed: int,
    capacity_bytes: int,
    preempt: bool = False,
    trace: Sequence[Arrival] = (),
    progress: Callable[[float], None] = lambda _: None,
) -> dict[str, Any]:
    """Plays the instances and reports what each of them got.

    ``trace`` is what the load ``trace`` plays; the bundled slice where it is empty.
    """
    if not 1 <= len(specs) <= MAX_INSTANCES:
        raise ConfigError(f"{len(specs)} instances: expected 1 to {MAX_INSTANCES}")
    if capacity_bytes < PAGE_BYTES * (len(specs) + 1):
        raise ConfigError(
            f"a capacity of {capacity_bytes} bytes has no page of {PAGE_BYTES} bytes for each "
            f"of {len(specs)} instances"
        )
    trace = trace or read_trace(None)
    dice = random.Random(seed)
    with (
        tempfile.TemporaryDirectory(prefix="kvcached-share-") as folder,
        Ledger.open(Path(folder) / "ledger", "host:share", capacity_bytes) as ledger,
    ):
        engines = []
        for index, spec in enumerate(specs):
            load = arrivals(spec.load, random.Random(f"{seed}/{index}"), trace, seconds)
            name = f"{spec.load}-{index}"
            engines.append(
                Engine(ledger, name, load, endless=spec.load == "endless", preempt=preempt)
            )
            _apply(ledger, name, spec)
        simulation = Simulation(ledger, engines, dice)
        simulation.run(seconds, progress)
        report = _report(simulation, specs, seconds)
        for engine in engines:
            engine.close()
    return {"seed": seed, "preempt": preempt, **report}


def _apply(ledger: Ledger, name: str, spec: InstanceSpec) -> None:
    if spec.limit is not None:
        ledger.set_limit(name, spec.limit.of(ledger.capacity))
    if guarantee := spec.guarantee.of(ledger.capacity):
        ledger.set_guarantee(name, guarantee)
    ledger.set_weight(name, spec.weight)


def _report(
    simulation: Simulation, specs: Sequence[InstanceSpec], seconds: float
) -> dict[str, Any]:
    capacity = simulation.ledger.capacity
    instances: list[dict[str, Any]] = []
    for engine, record, spec in zip(simulation.engines, simulation.records, specs, strict=True):
        # Who still waits counts with the time so far: a starved request must show.
        still = [simulation.now - r.arrived_s for r in engine.waiting if r.run == 0]
        waits = sorted(engine.waits + still)
        samples = max(1, record.samples)
        instances.append(
            {
                "name": engine.name,
                "weight": spec.weight,
                "guarantee_bytes": spec.guarantee.of(capacity),
                "below_guarantee_s": round(record.below_guarantee_s, 3),
                "requests": len(waits),
                "finished": engine.finished,
                "preempted": engine.preempted,
                "wait_p50_s": _percentile(waits, 0.50),
                "wait_p99_s": _percentile(waits, 0.99),
                "utilisation": round(record.in_use / samples / capacity, 4),
                "held": round(record.held / samples / capacity, 4),
                "contended_s": record.contended * SAMPLE_S,
                "part_of_share": round(record.part_of_share / max(1, record.contended), 4),
                "reclaimed_pages": engine.pool.counters.reclaimed,
                "evicted_blocks_by_pressure": engine.pool.counters.evicted_blocks,
            }
        )
    parts = [i["part_of_share"] for i in instances if i["contended_s"]]
    snapshot = simulation.ledger.snapshot()
    return {
        "seconds": seconds,
        "capacity_bytes": capacity,
        "high_water_bytes": snapshot.high_water,
        "utilisation": round(sum(i["utilisation"] for i in instances), 4),
        "jain": round(jain(parts), 4),
        "instances": instances,
    }


def _percentile(values: Sequence[float], part: float) -> float:
    """The value that ``part`` of the sorted values lie below; 0 where there is none."""
    if not values:
        return 0.0
    return round(values[min(len(values) - 1, int(part * len(values)))], 3)


def jain(values: Sequence[float]) -> float:
    """Jain's fairness index: 1 where all are equal, 1/n where one has everything.

    Jain, Chiu and Hawe, A Quantitative Measure of Fairness, DEC TR-301, 1984.
    """
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0
