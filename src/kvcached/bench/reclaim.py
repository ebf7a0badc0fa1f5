"""``kvcached bench reclaim``: how soon an engine gets memory that a neighbour only caches.

Real vLLM engines share one device. The first fills all of it with cached prefixes, comes to rest or
keeps working, and then one of the others gets a request that needs more than is free. Two times are
taken: from the demand to the lease, by the engine itself (``AccountSnapshot.waits``), and the time
to the first token, beside that of the same request on an empty device in the same round.

A neighbour at work evicts between two of its steps, so beside the first time stands the step of its
that was running when memory was demanded, as its client sees it: from one token to the next. And
beside all of it, for the host's memory, the kernel's own time for as much: its bare calls, in a
loop.
"""

from __future__ import annotations

import math
import os
import random
import statistics
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvcached import nvml
from kvcached.bench.vmm import open_backend
from kvcached.config import variable_of_an_engine
from kvcached.demo.load import Result, Target, play
from kvcached.demo.models import Model, describe, make_models
from kvcached.demo.servers import EngineProcess, EngineSpec, running
from kvcached.demo.trace import Request
from kvcached.errors import KvcachedError
from kvcached.ledger import Ledger
from kvcached.snapshot import AccountSnapshot
from kvcached.units import ceil_div
from kvcached.vmm_ops import time_bare_pages

KINDS = {"idle": "at rest", "busy": "at work"}
"""What the neighbour does meanwhile, in words."""
BLOCK_TOKENS = 32
PROMPT_TOKENS = 1900
MAX_MODEL_TOKENS = 2048
BURST_TOKENS = 8
"""Tokens that the measured request generates: enough to see that it goes on."""
FULL = 0.95
"""Of the device, held by the first engine before each measured request."""
REST_S = 1.3
"""Longer than an engine counts as working after its last request, and than vLLM's processes look
for each other's messages in a loop after the last one (1 s), which takes a core each.
"""
BUSY_S = (0.2, 2.5)
"""How long the neighbour has worked when memory is demanded, drawn between these: it computes its
prompt then, or generates.
"""
BARE_PAGES = 50
BUSY_CLIENTS = 1
BUSY_PROMPT_TOKENS = 1100
"""More than a page: what is in use shows that the neighbour works."""
BUSY_TOKENS = 512


class ReclaimBenchError(KvcachedError):
    """A request failed, or the memory did not come as planned: the figures would mean nothing."""


@dataclass(slots=True)
class Figures:
    """What was seen in all rounds of one kind."""

    waits_ms: list[float] = field(default_factory=list)
    ttft_ms: list[float] = field(default_factory=list)
    alone_ms: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    """The neighbour's step in which each demand fell; none if it rested."""
    past_ms: list[float] = field(default_factory=list)
    """From the end of that step to the lease; negative where memory was there before."""

    def summary(self) -> dict[str, Any]:
        """Percentiles; of the first tokens, also the median of each round's ratio."""
        ratios = [a / b for a, b in zip(self.ttft_ms, self.alone_ms, strict=True)]
        steps: dict[str, Any] = {}
        if self.step_ms:
            over = [wait / step for wait, step in zip(self.waits_ms, self.step_ms, strict=True)]
            steps = {
                "neighbour_step_ms": spread(self.step_ms),
                "lease_over_step": spread(over),
                "lease_past_step_ms": spread(self.past_ms),
            }
        return {
            "rounds": len(self.waits_ms),
            "demand_to_lease_ms": spread(self.waits_ms),
            "ttft_ms": spread(self.ttft_ms),
            "ttft_alone_ms": spread(self.alone_ms),
            "ttft_ratio": round(statistics.median(ratios), 3),
            **steps,
        }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile (the largest of fewer than a hundred) and maximum."""
    ordered = sorted(values)
    at = min(len(ordered) - 1, math.ceil(len(ordered) * 0.99) - 1)
    return {
        "p50": round(statistics.median(ordered), 2),
        "p99": round(ordered[at], 2),
        "max": round(ordered[-1], 2),
    }


def step_around(results: Sequence[Result], moment_s: float) -> tuple[float, float]:
    """The step of an engine that ran at a moment, by what its one client saw: since when, and
    until when. Raises ReclaimBenchError if the engine did nothing then.
    """
    ends = sorted(end for each in results for end in (each.sent_s, *each.arrivals_s))
    at = bisect_right(ends, moment_s)
    if not 0 < at < len(ends):
        raise ReclaimBenchError("the neighbour did not work when memory was demanded")
    return ends[at - 1], ends[at]


class DemandWatch:
    """Notes when memory is first demanded of the device, from ``with`` to its end."""

    def __init__(self, ledger: Ledger) -> None:
        self._core = ledger.core
        self._seen = self._core.pressure_seq
        self._found_s: float | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> DemandWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def demanded_s(self) -> float:
        """When, on the monotonic clock. Raises ReclaimBenchError if it was not."""
        if self._found_s is None:
            raise ReclaimBenchError("no engine demanded memory")
        return self._found_s

    def _run(self) -> None:
        while not self._over.is_set():
            if self._core.wait_pressure(self._seen, 0.1) != self._seen:
                self._found_s = time.monotonic()
                return


def run(
    out: Path,
    *,
    instances: int = 2,
    rounds: int = 50,
    kinds: Sequence[str] = tuple(KINDS),
    budget_bytes: int = 0,
    model: Path | None = None,
    gpu: bool = False,
    engine_arguments: Sequence[str] = (),
    seed: int = 1,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Starts the engines and plays ``rounds`` rounds of each kind: with the neighbour at rest
    (``idle``) and at work (``busy``). ``model`` is a folder; the demo's small one is made if it is
    None, and weights are made up where it has none. With ``gpu`` they share the first GPU that is
    visible, and otherwise the host's memory. A budget of 0 is room for eight requests.
    ``engine_arguments`` go to ``vllm serve``. Blocks; needs vLLM. Raises KvcachedError.
    """
    out.mkdir(parents=True, exist_ok=True)
    chosen = describe(model.name, model) if model else make_models(out.parent / "models")[1]
    token_bytes = chosen.token_bytes // (2 if gpu else 1)  # in 16 bits there
    budget = budget_bytes or 8 * PROMPT_TOKENS * token_bytes
    device = _visible_gpu() if gpu else f"host:reclaim-{os.getpid()}"
    specs = _specs(out, chosen, instances, budget, device, engine_arguments)
    with running(specs, say) as engines:
        directory = Path(specs[0].environment["KVCACHED_DIR"])
        with Ledger.open(directory, device, create=False, read_only=True) as ledger:
            bench = Bench(engines, ledger, chosen, random.Random(seed))
            for other in engines[1:]:
                bench.alone(other)  # what is made at the first use must not count
            seen = {kind: Figures() for kind in kinds}
            for kind, figures in seen.items():
                play_round = bench.round_idle if kind == "idle" else bench.round_busy
                for number in range(rounds):
                    play_round(engines[1 + number % (instances - 1)], figures)
                    say(_progress(KINDS[kind], figures, rounds))
                say(f"neighbour {KINDS[kind]}: {figures.summary()}")
            snapshot = ledger.snapshot()
            page_bytes = snapshot.accounts[0].page_bytes
    pages = ceil_div(PROMPT_TOKENS * token_bytes, page_bytes)
    return {
        "benchmark": "reclaim",
        "device": device,
        "instances": instances,
        "model": chosen.name,
        "budget_bytes": budget,
        "high_water_bytes": snapshot.high_water,
        "request_bytes": pages * page_bytes,
        "bare_release_ms": None if gpu else _bare_release_ms(pages, page_bytes),
        "cpus": os.cpu_count(),
        "seed": seed,
        **{kind: figures.summary() for kind, figures in seen.items()},
    }


def _progress(what: str, figures: Figures, rounds: int) -> str:
    return (
        f"neighbour {what}, round {len(figures.waits_ms)} of {rounds}: lease after "
        f"{figures.waits_ms[-1]:.1f} ms, first token after {figures.ttft_ms[-1]:.0f} ms "
        f"(alone {figures.alone_ms[-1]:.0f} ms)"
    )


def _visible_gpu() -> str:
    return nvml.visible_uuid(0, variable_of_an_engine("CUDA_VISIBLE_DEVICES"))


def _bare_release_ms(pages: int, page_bytes: int) -> float:
    _, bare_us = time_bare_pages(open_backend("host"), page_bytes, BARE_PAGES, False)
    return round(pages * statistics.median(bare_us) / 1e3, 2)


def _specs(
    out: Path, model: Model, instances: int, budget: int, device: str, more: Sequence[str]
) -> list[EngineSpec]:
    environment = {
        "ENABLE_KVCACHED": "true",
        "KVCACHED_CAPACITY": str(budget),
        "KVCACHED_VIRTUAL": str(4 * budget),
        # On a GPU the file of a run before would be found, with its capacity.
        "KVCACHED_DIR": str((out / f"ledger-{os.getpid()}").resolve()),
    }
    arguments = ["--max-model-len", str(MAX_MODEL_TOKENS), "--max-num-seqs", "64"]
    if device.startswith("host:"):
        environment["KVCACHED_DEVICE"] = device
        arguments += ["--dtype", "float32", "--enforce-eager", "--block-size", str(BLOCK_TOKENS)]
    else:
        environment["KVCACHED_HEADROOM"] = "0"  # the budget is for pages alone
        arguments += ["--dtype", "bfloat16"]
    if not any(model.path.glob("*.safetensors")):
        arguments += ["--load-format", "dummy"]
    if not any(model.path.glob("tokenizer*")):
        arguments += ["--skip-tokenizer-init"]
    return [
        EngineSpec(
            name, model, (*arguments, *more), {**environment, "KVCACHED_NAME": name},
            out / f"reclaim-{name}.log",
        )
        for name in "abcdefgh"[:instances]
    ]  # fmt: skip


class Bench:
    """The engines and their ledger; the first engine is the neighbour that caches."""

    def __init__(
        self, engines: Sequence[EngineProcess], ledger: Ledger, model: Model, dice: random.Random
    ) -> None:
        self._engines = engines
        self._ledger = ledger
        self._dice = dice
        self._vocab = model.vocab
        self._targets = {e.name: Target(e.url, e.spec.model.name) for e in engines}
        self._ids = 0

    def alone(self, engine: EngineProcess) -> float:
        """The time to the first token, in ms, of the measured request on an empty device."""
        for each in self._engines:
            each.reset_prefix_cache()
        self._wait(lambda: self._charge() <= 2 * self._pages() * len(self._engines), "empty")
        time.sleep(REST_S)
        return self._ask(engine)

    def round_idle(self, engine: EngineProcess, figures: Figures) -> None:
        """One request to ``engine`` while the neighbour rests on a device full of its cache."""
        alone_ms = self.alone(engine)
        engine.reset_prefix_cache()
        self._fill()
        time.sleep(REST_S)
        wait_ms, ttft_ms = self._measure(engine)
        figures.alone_ms.append(alone_ms)
        figures.waits_ms.append(wait_ms)
        figures.ttft_ms.append(ttft_ms)

    def round_busy(self, engine: EngineProcess, figures: Figures) -> None:
        """The same while requests run at the neighbour, which works before both measurements:
        the machine has to be shared in both.
        """
        for each in self._engines:
            each.reset_prefix_cache()
        with self._busy():
            alone_ms = self._ask(engine)
        engine.reset_prefix_cache()
        self._fill()
        with self._busy() as results, DemandWatch(self._ledger) as watch:
            wait_ms, ttft_ms = self._measure(engine)
        since_s, until_s = step_around(results, watch.demanded_s())
        figures.alone_ms.append(alone_ms)
        figures.waits_ms.append(wait_ms)
        figures.ttft_ms.append(ttft_ms)
        figures.step_ms.append((until_s - since_s) * 1e3)
        figures.past_ms.append((watch.demanded_s() - until_s) * 1e3 + wait_ms)

    def _measure(self, engine: EngineProcess) -> tuple[float, float]:
        """From the demand to the lease, and to the first token, in ms."""
        before = self._account(engine.name)
        ttft_ms = self._ask(engine)
        after = self._account(engine.name)
        if after.waits == before.waits:
            raise ReclaimBenchError(f"engine {engine.name} did not have to wait for memory")
        waited_us = after.waited_us - before.waited_us
        return waited_us / (after.waits - before.waits) / 1e3, ttft_ms

    def _fill(self) -> None:
        """Requests of different prompts to the first engine, until its cache is all there is."""
        first = self._engines[0].name
        for _ in range(64):
            held = self._account(first)
            free = self._ledger.snapshot().free
            if held.charge > FULL * self._ledger.capacity or free < 2 * held.page_bytes:
                return
            self._send(first, PROMPT_TOKENS, 1)
        raise ReclaimBenchError(f"engine {first} does not fill the device: {held}")

    @contextmanager
    def _busy(self) -> Iterator[list[Result]]:
        """Clients that keep the first engine at work; their results once the block has ended."""
        first, results, over = self._engines[0].name, list[Result](), threading.Event()

        def client() -> None:
            while not over.is_set():
                results.append(self._send(first, BUSY_PROMPT_TOKENS, BUSY_TOKENS))

        threads = [threading.Thread(target=client) for _ in range(BUSY_CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            self._wait(lambda: self._account(first).in_use > self._pages(), "the neighbour works")
            time.sleep(self._dice.uniform(*BUSY_S))
            yield results
        finally:
            over.set()
            for thread in threads:
                thread.join()

    def _ask(self, engine: EngineProcess) -> float:
        ttft_ms = self._send(engine.name, PROMPT_TOKENS, BURST_TOKENS).ttft_ms
        assert ttft_ms is not None
        return ttft_ms

    def _send(self, name: str, tokens: int, max_tokens: int) -> Result:
        self._ids += 1
        prompt = tuple(self._dice.randrange(5, self._vocab) for _ in range(tokens))
        request = Request(self._ids, "reclaim", name, 0.0, prompt, max_tokens)
        (result,) = play([request], self._targets)
        if not result.ok:
            raise ReclaimBenchError(f"a request of engine {name} failed: {result.error}")
        return result

    def _account(self, name: str) -> AccountSnapshot:
        account = self._ledger.snapshot().account(name)
        if account is None:
            raise ReclaimBenchError(f"engine {name} has no account")
        return account

    def _charge(self) -> int:
        return self._ledger.snapshot().charge

    def _pages(self) -> int:
        return self._account(self._engines[0].name).page_bytes

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        end_s = time.monotonic() + 10
        while not condition():
            if time.monotonic() > end_s:
                raise ReclaimBenchError(f"not within 10 s: {what}")
            time.sleep(0.005)
