"""Runs one configuration: starts its engines, plays the load, collects what happened."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from kvcached.cli.accounts import LedgerReader
from kvcached.demo.figures import PhaseRun, Session, latency, tokens_per_s
from kvcached.demo.load import Target, play
from kvcached.demo.sampler import Sampler
from kvcached.demo.screen import Screen, Sources
from kvcached.demo.servers import EngineProcess, running
from kvcached.demo.setups import Options, Setup
from kvcached.demo.trace import PHASE_TITLES, PHASES, Request, at_once

SETTLE_LIMIT_S = 5.0


def run_session(
    setup: Setup,
    options: Options,
    load: Sequence[Request],
    screen: Screen,
    *,
    runs: int,
    paced: bool = True,
    alone: bool = False,
    before_stop: Callable[[Session, dict[str, Target]], None] | None = None,
) -> Session:
    """Plays all phases ``runs`` times; with ``alone`` also measures engine A's speed by itself.

    ``before_stop`` runs while the engines are still up. Raises EngineFailedError.
    """
    screen.say(f"[bold]{setup.name}[/bold]: {setup.title}; starting {len(setup.specs)} engines")
    session = Session(setup.name, tuple(spec.name for spec in setup.specs))
    with running(setup.specs, screen.say) as engines:
        targets = {e.name: Target(e.url, e.spec.model.name) for e in engines}
        samples_file = options.out / f"{setup.name}-memory.samples"
        with Sampler([engine.session for engine in engines], samples_file) as sampler:
            ledger = _ledger_reader(setup, options)
            sources = _sources(setup, options, session.engines, sampler, ledger)
            session.ledger_before = ledger.read_or_none() if ledger else None
            for run in range(runs):
                _reset(engines)
                session.runs.append(
                    [
                        _play_phase(p, run, engines, targets, load, screen, sources, paced)
                        for p in PHASES
                    ]
                )
            session.ledger_loaded = ledger.read_or_none() if ledger else None
            if alone:
                session.alone_tokens_per_s = _alone(engines, targets, load, options, screen)
            _reset(engines)
            session.physical_after = _settled(sampler)
            session.ledger_after = ledger.read_or_none() if ledger else None
            if before_stop:
                before_stop(session, targets)
            session.samples = sampler.stop()
    return session


def _ledger_reader(setup: Setup, options: Options) -> LedgerReader | None:
    if setup.name != "elastic":
        return None
    return LedgerReader(options.ledger_directory, options.device)


def _sources(
    setup: Setup,
    options: Options,
    engines: tuple[str, ...],
    sampler: Sampler,
    ledger: LedgerReader | None,
) -> Sources:
    shares = {"static": options.budget_bytes // 2, "reference": options.budget_bytes}
    return Sources(
        engines=engines,
        budget_bytes=options.budget_bytes,
        static_bytes=shares.get(setup.name),
        sample=sampler.latest,
        ledger=ledger.read_or_none if ledger else lambda: None,
    )


def _play_phase(
    phase: str,
    run: int,
    engines: Sequence[EngineProcess],
    targets: dict[str, Target],
    load: Sequence[Request],
    screen: Screen,
    sources: Sources,
    paced: bool,
) -> PhaseRun:
    part = [request for request in load if request.phase == phase]
    before = {engine.name: engine.preemptions() for engine in engines}
    start_s = time.monotonic()
    with screen.phase(f"{PHASE_TITLES[phase]} (run {run + 1})", sources):
        results = play(part, targets, screen.observe, paced)
    end_s = time.monotonic()
    preempted = {engine.name: engine.preemptions() - before[engine.name] for engine in engines}
    ttft = latency(result.ttft_ms for result in results)
    failed = sum(not result.ok for result in results)
    screen.say(
        f"  {PHASE_TITLES[phase]}: {len(part)} requests in {end_s - start_s:.1f} s, "
        f"TTFT mean {ttft.get('mean', 0) / 1e3:.2f} s, p99 {ttft.get('p99', 0) / 1e3:.2f} s, "
        f"preemptions {sum(preempted.values())}"
        + (f", [red]failed {failed}[/red]" if failed else "")
    )
    return PhaseRun(phase, start_s, end_s, results, preempted)


def _alone(
    engines: Sequence[EngineProcess],
    targets: dict[str, Target],
    load: Sequence[Request],
    options: Options,
    screen: Screen,
) -> list[float]:
    """Tokens per second of engine A while B idles, once for each pair; requests sent at once."""
    part = at_once(load, "A", options.overhead_requests)
    speeds = []
    for _ in range(options.overhead_pairs):
        _reset(engines)
        speeds.append(tokens_per_s(play(part, targets)))
    screen.say(f"  A alone: {', '.join(f'{speed:.0f}' for speed in speeds)} tokens/s")
    return speeds


def _reset(engines: Sequence[EngineProcess]) -> None:
    for engine in engines:
        engine.reset_prefix_cache()


def _settled(sampler: Sampler) -> tuple[int, ...]:
    """Physical bytes once they have stopped falling, at the latest after SETTLE_LIMIT_S."""
    deadline_s = time.monotonic() + SETTLE_LIMIT_S
    seen = sampler.latest()
    while time.monotonic() < deadline_s:
        time.sleep(1.0)
        now = sampler.latest()
        if now is not None and seen is not None and now.engine_bytes == seen.engine_bytes:
            break
        seen = now
    return seen.engine_bytes if seen else ()
