"""Four models behind `kvcached serve` on a machine with room for two: what sleep costs and saves.

The same trace is played three times, through the one address: with all models awake, with idle
ones giving their KV cache back, and with two places for four models, whose processes end and start.
Every answer is compared with that of an engine without kvcached.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import yaml

from kvcached.config import child_environment
from kvcached.demo.load import Result, Target, play
from kvcached.demo.models import Model, make_models
from kvcached.demo.percentiles import percentile
from kvcached.demo.servers import ENGINE_ENVIRONMENT
from kvcached.demo.service import ARGUMENTS
from kvcached.demo.trace import LoadShape, Request, TraceRow, make_load, read_slice
from kvcached.errors import KvcachedError
from kvcached.ledger import Ledger
from kvcached.processes import session_processes

NAMES = ("one", "two", "three", "four")
ACTIVE = (("one", "two"), ("three",), ("four", "one"), ("two", "three"))
"""Who gets requests in each phase."""
MODES: Mapping[str, dict[str, Any]] = {
    "all awake": {"sleep": {"kv_after_s": None}, "start": "at once"},
    "kv": {"sleep": {"kv_after_s": 1, "after_s": 5, "how": "kv"}, "start": "at once"},
    "stop": {"sleep": {"kv_after_s": 1, "after_s": 15, "how": "stop"}},
}
PLACES = 2
_LOOK_S = 0.25
_START_LIMIT_S = 240.0
_END_LIMIT_S = 60.0
_PAGE = os.sysconf("SC_PAGE_SIZE")


class ServeBenchError(KvcachedError):
    """The service did not start; the message holds the end of what it printed."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How the trace is played."""

    phase_s: float = 35.0
    requests: int = 16
    """Of each active model in each phase."""
    budget_bytes: int = 96 << 20
    folder: Path = Path("build/bench-serve")


def run(plan: Plan, modes: Sequence[str], progress: Callable[[str], None]) -> dict[str, Any]:
    """Plays the trace with each mode. Raises ServeBenchError or ModelError."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    (_, model) = make_models(plan.folder.parent / "models")
    load = _load(plan, model)
    progress(f"{len(load)} requests; first an engine without kvcached, for the right answers")
    plain = {"models": [{**_model("plain", model, {}), "environment": {"ENABLE_KVCACHED": False}}]}
    plain["models"][0]["arguments"] |= {"kv-cache-memory-bytes": 4 * plan.budget_bytes}
    with _serving(plan, "plain", plain) as service:
        right = play(load, dict.fromkeys(NAMES, Target(service.url, "plain")), paced=False)
    failed = [result.error for result in right if not result.ok]
    if failed:
        raise ServeBenchError(f"the engine without kvcached failed: {failed[0]}")
    return {
        "requests": len(load),
        "phase_s": plan.phase_s,
        "budget_bytes": plan.budget_bytes,
        "modes": {mode: _play(plan, mode, model, load, right, progress) for mode in modes},
    }


def _play(
    plan: Plan,
    mode: str,
    model: Model,
    load: Sequence[Request],
    right: Sequence[Result],
    progress: Callable[[str], None],
) -> dict[str, Any]:
    settings: dict[str, Any] = {"models": [_model(name, model, MODES[mode]) for name in NAMES]}
    if mode == "stop":
        settings |= {"max_awake": PLACES, "turn_s": plan.phase_s / 2}
    with _serving(plan, mode.replace(" ", "-"), settings) as service:
        if "start" in MODES[mode]:
            service.wait_for_start()
        progress(f"{mode}: the trace begins")
        with service.followed() as seen:
            results = play(load, {name: Target(service.url, name) for name in NAMES})
        starts = {each["name"]: each["starts"] for each in service.models()}
        high_water = service.high_water()
    pairs = zip(results, right, strict=True)
    wrong = [result.request.id for result, good in pairs if result.tokens != good.tokens]
    ttft = sorted(result.ttft_ms for result in results if result.ttft_ms is not None)
    return {
        "answered": sum(result.ok for result in results),
        "errors": [result.error for result in results if not result.ok],
        "wrong": wrong,
        "ttft_ms": {f"p{p}": round(percentile(ttft, p), 1) for p in (50, 90, 99)}
        | {"max": round(ttft[-1], 1)},
        "last_answer_s": round(max(r.last_s or 0 for r in results) - results[0].sent_s, 1),
        "starts": starts,
        "states": seen.states,
        "resident_mean_bytes": round(sum(seen.resident) / max(1, len(seen.resident))),
        "resident_peak_bytes": max(seen.resident, default=0),
        "kv_high_water_bytes": high_water,
    }


def _model(name: str, model: Model, mode: Mapping[str, Any]) -> dict[str, Any]:
    path = str(model.path.absolute())
    return {"name": name, "model": path, "arguments": dict(ARGUMENTS), **mode}


def _load(plan: Plan, model: Model) -> list[Request]:
    """The trace's rows, in order, over the phases; in each one compressed into most of it, so that
    who falls idle has time to fall asleep.
    """
    rows = read_slice()
    shape = LoadShape()
    prompts = make_load(shape, {"A": model, "B": model})
    load: list[Request] = []
    for phase, active in enumerate(ACTIVE):
        for name in active:
            chosen = rows[len(load) : len(load) + plan.requests]
            for row, at_s in zip(chosen, _arrivals(chosen, 0.7 * plan.phase_s), strict=True):
                template = prompts[len(load) % len(prompts)]
                at_s += phase * plan.phase_s
                load.append(
                    replace(template, id=len(load), engine=name, phase=str(phase), at_s=at_s,
                            max_tokens=_output(row, shape))
                )  # fmt: skip
    return load


def _arrivals(rows: Sequence[TraceRow], span_s: float) -> list[float]:
    first, last = rows[0].at_s, rows[-1].at_s
    return [(row.at_s - first) / max(last - first, 1e-9) * span_s for row in rows]


def _output(row: TraceRow, shape: LoadShape) -> int:
    wanted = round(row.generated_tokens / shape.output_divisor)
    return max(shape.output_min, min(shape.output_max, wanted))


class _Seen:
    def __init__(self) -> None:
        self.states: dict[str, int] = {}
        """Looks at which any model was in a state."""
        self.resident: list[int] = []


class _Service:
    def __init__(self, url: str, ledger: tuple[Path, str]) -> None:
        self.url = url
        self._ledger = ledger

    def models(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = httpx.get(self.url + "/status", timeout=30).json()["models"]
        return found

    def wait_for_start(self) -> None:
        """Until all models have started."""
        end_s = time.monotonic() + _START_LIMIT_S
        while True:
            found = self.models()
            if all(each["starts"] and each["state"] != "starting" for each in found):
                return
            if time.monotonic() > end_s or any(each["error"] for each in found):
                raise ServeBenchError(f"the models do not start: {found}")
            time.sleep(_LOOK_S)

    def high_water(self) -> int:
        """The most that was ever charged for KV caches."""
        with Ledger.open(*self._ledger, create=False, read_only=True) as ledger:
            return ledger.snapshot().high_water

    @contextlib.contextmanager
    def followed(self) -> Iterator[_Seen]:
        """Looks at states and memory until the block ends."""
        seen, end = _Seen(), threading.Event()

        def follow() -> None:
            while not end.wait(_LOOK_S):
                models = self.models()
                for each in models:
                    seen.states[each["state"]] = seen.states.get(each["state"], 0) + 1
                pids = [p for each in models if each["pid"] for p in session_processes(each["pid"])]
                seen.resident.append(sum(map(_resident, pids)))

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield seen
        finally:
            end.set()
            thread.join()


def _resident(pid: int) -> int:
    """Bytes of a process that are its own."""
    try:
        with open(f"/proc/{pid}/statm") as stream:
            _, resident, shared, *_ = map(int, stream.read().split())
    except OSError:
        return 0  # it ended meanwhile
    return (resident - shared) * _PAGE


@contextlib.contextmanager
def _serving(plan: Plan, name: str, settings: dict[str, Any]) -> Iterator[_Service]:
    ledger = ((plan.folder / "ledger").absolute(), f"host:bench-{os.getpid()}-{name}")
    memory = {"device": ledger[1], "directory": str(ledger[0]), "capacity": plan.budget_bytes}
    data = {"listen": "127.0.0.1:0", "memory": memory, "environment": dict(ENGINE_ENVIRONMENT)}
    path = plan.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**data, **settings}))
    with service(path, plan.folder / f"{name}.log") as url:
        yield _Service(url, ledger)


@contextlib.contextmanager
def service(file: Path, output: Path) -> Iterator[str]:
    """`kvcached serve` with this file runs while the block does; yields its address. What it prints
    goes to ``output``. Raises ServeBenchError where it does not start.
    """
    with output.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "kvcached.cli.main", "serve", str(file), "--json"],
            env=child_environment({}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise ServeBenchError(f"the service did not start: {output.read_text()[-2000:]}")
        yield json.loads(line)["url"]
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_LIMIT_S)
        process.kill()
        process.wait()
        process.stdout.close()
