"""The engines of one side, their load points and the time that is left for them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fleet
import multi_llm_report as report
from engine import GIB, Job
from fleet import Fleet, say
from multi_llm_report import Slo

from kvcached import nvml
from kvcached.ledger import Ledger

LEAD_S = 1.5  # from a start file to the start: prompts are made meanwhile
END_S = 15.0  # for the engines of a side to end
DRAIN_S = 8.0  # what a point is expected to take after its span
WARM_UP = "warm-up"


class EngineEndedError(Exception):
    """An engine of the benchmark died, or the time is over."""


@dataclass(slots=True)
class Memory:
    """What is in use while a side runs, ten times a second: on the GPU, and by each account."""

    gpu: nvml.Gpu | None
    ledger: Ledger | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    point: str = ""
    _next: float = 0.0

    def tick(self) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + 0.1
        sample: dict[str, Any] = {"at_s": round(now - fleet.STARTED, 2), "point": self.point}
        if self.gpu is not None:
            sample["used_gib"] = round(self.gpu.memory()[0] / GIB, 3)
        if self.ledger is not None:
            accounts = sorted(self.ledger.snapshot().accounts, key=lambda one: one.name)
            sample["charge_gib"] = [round(one.charge / GIB, 3) for one in accounts]
            sample["in_use_gib"] = [round(one.in_use / GIB, 3) for one in accounts]
        self.samples.append(sample)


@dataclass(slots=True)
class Side:
    """One side of the comparison and how it goes."""

    name: str
    jobs: tuple[Job, ...]
    memory: Memory
    started: list[Job] = field(default_factory=list)
    start_s: float = 0.0
    took_s: dict[str, float] = field(default_factory=dict)  # by point
    told: dict[str, Any] = field(default_factory=lambda: {"points": {}, "skipped": {}})


@dataclass(slots=True)
class Stage:
    """Where both sides play."""

    engines: Fleet
    plan: dict[str, Any]
    limit_s: float
    in_turn: bool
    device: str
    slo: Slo
    sides: int = 2  # that are to play here

    def left_s(self) -> float:
        return self.limit_s - (time.monotonic() - fleet.STARTED)

    def play(self, side: Side, before: Side | None, save: Callable[[], None]) -> None:
        """Starts a side's engines, runs its points, ends them. ``before`` has played already."""
        say(f"{side.name}: starting {len(side.jobs)} engines")
        try:
            self._start(side)
            self._run_point(side, WARM_UP, 0)
            for index, point in enumerate(self.plan["points"]):
                if point == WARM_UP:
                    continue
                if why := self._why_not(side, before, point):
                    say(f"{side.name}: {point} is skipped: {why}")
                    side.told["skipped"][point] = why
                    self._tell(side, index, {"skip": True})
                    continue
                self._run_point(side, point, index)
                save()
        except EngineEndedError as error:
            side.told["problem"] = str(error)
        Path(side.jobs[0].hold_file).touch()
        if "problem" in side.told:
            self.engines.end()
        self.engines.finish(side.memory.tick)
        side.told |= self._afterwards(side)
        save()

    def _afterwards(self, side: Side) -> dict[str, Any]:
        """What engines and ledger say at the end."""
        told: dict[str, Any] = {"memory": side.memory.samples, "engines": {}}
        for job in side.jobs:
            result = self.engines.results.get(job.name, {})
            told["wakes_s"] = told.get("wakes_s", []) + [
                took for work in result.get("work", {}).values() for took in work.get("wakes_s", [])
            ]
            told["engines"][job.name] = {k: v for k, v in result.items() if k != "work"}
        if side.memory.ledger is not None:
            seen = side.memory.ledger.snapshot()
            told["capacity_gib"] = seen.capacity / GIB
            told["high_water_gib"] = seen.high_water / GIB
            told["headroom_gib"] = seen.headroom / GIB
            side.memory.ledger.close()
        return told

    def _why_not(self, side: Side, before: Side | None, point: str) -> str:
        if before is not None and point not in before.took_s:
            return f"{before.name} has not run it"
        if before is not None:
            return self._no_time(before.took_s[point], END_S)
        expected = LEAD_S + self.plan["points"][point]["span_s"] + DRAIN_S
        if self.sides == 1:
            return self._no_time(expected, END_S)
        again = side.start_s + sum(side.took_s.values()) + expected + END_S
        return self._no_time(expected, END_S + again * (self.sides - 1))

    def _no_time(self, point_s: float, later_s: float) -> str:
        left = self.left_s()
        if point_s + later_s <= left:
            return ""
        return f"{left:.0f} s are left, it and what follows take {point_s + later_s:.0f} s"

    def _start(self, side: Side) -> None:
        begun = time.monotonic()
        for job in side.jobs:
            for path in (job.ready_file, *job.start_files, job.hold_file):
                Path(path).unlink(missing_ok=True)
        if side.jobs[0].turns:
            Path(side.jobs[0].turns).unlink(missing_ok=True)
        for job in side.jobs:
            self.engines.start(job)
            side.started.append(job)
            if self.in_turn or job.turns:  # one at a time has room while it is awake
                self._until(side, job.ready_file)
        for job in side.jobs:
            self._until(side, job.ready_file)
        side.start_s = time.monotonic() - begun
        side.told["start_s"] = side.start_s
        if side.jobs[0].elastic:
            folder = self.engines.folder / "ledger"
            side.memory.ledger = Ledger.open(folder, self.device, create=False, read_only=True)
        say(f"{side.name}: {len(side.jobs)} engines are up after {side.start_s:.0f} s")

    def _until(self, side: Side, path: str) -> None:
        while not Path(path).exists():
            self._tick(side)

    def _tick(self, side: Side) -> None:
        side.memory.tick()
        for job in side.started:
            if not self.engines.alive(job):
                raise EngineEndedError(f"{job.name} ended: see its log")
        if self.left_s() < 0:
            raise EngineEndedError("out of time")
        time.sleep(0.02)

    def _tell(self, side: Side, index: int, what: dict[str, Any]) -> None:
        for job in side.jobs:
            path = Path(job.start_files[index])
            part = path.with_name(path.name + ".part")
            part.write_text(json.dumps(what))
            part.rename(path)

    def _run_point(self, side: Side, point: str, index: int) -> None:
        begun = time.monotonic()
        side.memory.point = point
        self._tell(side, index, {"skip": False, "point": point, "start_s": begun + LEAD_S})
        found: dict[str, Any] = {}
        next_look = 0.0
        while len(found) < len(side.jobs):
            self._tick(side)
            if time.monotonic() < next_look:
                continue
            next_look = time.monotonic() + 0.2
            for job in side.jobs:
                work = json.loads((self.engines.folder / f"{job.name}.json").read_text())["work"]
                if f"point-{point}" in work:
                    found[job.name] = work[f"point-{point}"]
        side.memory.point = ""
        side.took_s[point] = time.monotonic() - begun
        if point == WARM_UP:
            return
        results = [found[job.name] for job in side.jobs]
        figures = report.point_figures(results, self.plan["points"][point], self.slo)
        side.told["points"][point] = figures | {"requests": [result["each"] for result in results]}
        ttft = figures["all"]["ttft_s"]
        say(
            f"{side.name}: {point}: {figures['all']['requests']} requests in "
            f"{figures['seconds']:.1f} s, TTFT mean {1e3 * ttft.get('mean', 0):.0f} ms, "
            f"p99 {1e3 * ttft.get('p99', 0):.0f} ms, {figures['all']['unfinished']} not ended"
        )
