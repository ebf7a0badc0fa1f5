"""Stops and kills of the processes of a live engine, and what is measured around them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

from harness import PROMPTS, Load, Pair, wait_until

from kvcached.demo.processes import session_processes

# How long an instance may outlive any one of its processes.
END_LIMIT_S = 1.0


@dataclass(frozen=True, slots=True)
class Kill:
    """What one kill did."""

    what: str
    gone_s: float
    """From the signal until no process of the instance was left."""
    free_s: float
    """From the end of the last process that maps memory until its bytes could be leased."""
    b_p99_s: float

    def __str__(self) -> str:
        return (
            f"kill {self.what}: instance gone after {self.gone_s * 1e3:.0f} ms, bytes leasable "
            f"{self.free_s * 1e3:.0f} ms after its last mapping process, "
            f"B's TTFT p99 {self.b_p99_s * 1e3:.0f} ms"
        )


def _follow_death(pair: Pair, session: int, worker: int, start: float) -> tuple[float, float]:
    """Seconds until the instance is gone, and from the worker's end until nothing is charged."""
    worker_gone = free = gone = 0.0
    while not (gone and free):
        alive = session_processes(session)
        now = time.monotonic()
        assert now - start < 20, f"{alive} live on"
        if not worker_gone and worker not in alive:
            worker_gone = now
        if not gone and not alive:
            gone = now
        if worker_gone and not free:
            pair.ledger.reap()
            account = pair.ledger.snapshot().account("a")
            if account is None or account.charge == 0:
                free = time.monotonic()
        time.sleep(0.002)
    return gone - start, free - worker_gone


def kill(pair: Pair, what: str, after_s: float, expected: Sequence[Sequence[int]]) -> Kill:
    """SIGKILL to one kind of process of A under load, while B is asked all the time."""
    pids = pair.pids(pair.a)
    session = pair.a.session
    with pair.watch() as memory, Load(pair.b, 2, 24) as b:
        with Load(pair.a, 6) as a:
            time.sleep(after_s)
            wait_until(lambda: pair.account(pair.a).charge > 2 << 20, 20, "A works")
            seen = len(b.answers)
            start = time.monotonic()
            os.kill(pids[what], signal.SIGKILL)
            gone_s, free_s = _follow_death(pair, session, pids["worker"], start)
        wait_until(lambda: len(b.answers) >= seen + 4, 30, "B goes on answering")
    assert b.failures() == []
    assert b.wrong(expected) == [] and a.wrong(expected) == []
    assert memory.peak <= pair.capacity
    assert pair.ledger.snapshot().high_water <= pair.capacity
    return Kill(what, gone_s, free_s, b.p99_s())


def stop(
    pair: Pair, what: str, after_s: float, for_s: float, expected: Sequence[Sequence[int]]
) -> float:
    """SIGSTOP and SIGCONT of one kind of process of A under load; B's TTFT p99 in seconds."""
    pid = pair.pids(pair.a)[what]
    with pair.watch() as memory, Load(pair.b, 2, 24) as b, Load(pair.a, 6) as a:
        time.sleep(after_s)
        os.kill(pid, signal.SIGSTOP)
        try:
            seen = len(b.answers)
            time.sleep(for_s)
            wait_until(lambda: len(b.answers) > seen, 30, "B answers meanwhile")
        finally:
            os.kill(pid, signal.SIGCONT)
        done = len(a.answers)
        wait_until(lambda: len(a.answers) >= done + len(PROMPTS), 60, "A goes on")
    assert a.failures() == [] and b.failures() == []
    assert a.wrong(expected) == [] and b.wrong(expected) == []
    assert memory.peak <= pair.capacity
    assert pair.ledger.snapshot().high_water <= pair.capacity
    return b.p99_s()


def undisturbed(pair: Pair, for_s: float, expected: Sequence[Sequence[int]]) -> float:
    """B's TTFT p99 while A is under the same load and nothing happens."""
    with Load(pair.b, 2, 24) as b, Load(pair.a, 6) as a:
        time.sleep(for_s)
    assert a.failures() == [] and b.failures() == []
    assert a.wrong(expected) == [] and b.wrong(expected) == []
    return b.p99_s()
