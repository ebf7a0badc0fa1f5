"""Random kills of ranks: does the whole instance end, and does all of its memory come back?

Engines with two ranks and an own process for the engine's core, ten at a time on the same GPUs.
One rank of each gets SIGKILL at a random moment: of every four engines one while the model loads
or soon after, three once requests run. The others go on meanwhile; each has its turn.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fleet
from engine import Job
from fleet import Fleet

from kvcached.errors import LedgerError
from kvcached.ledger import Ledger
from kvcached.processes import session_processes

AT_A_TIME = 10
HANG_S = 30.0
LOADING_S, WORKING_S = 12.0, 5.0  # a kill comes at random within so long of the ranks, of requests
RANKS = 2


@dataclass(slots=True)
class Victim:
    """One engine on its way. Times are of the monotonic clock."""

    job: Job
    at_work: bool  # it is to be killed while requests run
    kill_at: float | None = None
    killed_at: float | None = None
    rank: int = -1
    working: bool = False  # when it was killed
    watched: dict[int, int] = field(default_factory=dict)  # pid by pidfd, of what lives on
    parts_s: float | None = None  # until its core and its ranks had ended
    front_s: float | None = None  # and the process that holds the engine
    free_s: float | None = None  # and nothing was charged on any GPU


def job_of(number: int, model: str, folder: Path) -> Job:
    return Job(
        name=f"kill-{number:03}",
        model=model,
        work=("decode",),
        elastic=True,
        ledger=str(folder / "kill-ledger"),
        own_core=True,
        ranks=RANKS,
        sharpen=False,
        compilation={"mode": 0, "cudagraph_mode": "NONE"},
    )


def run(engines: Fleet, model: str, kills: int, seconds: float) -> dict[str, Any]:
    """Kills until the number or the time is reached; figures of all of them."""
    draw, until = random.Random(20), time.monotonic() + seconds
    started = 0
    going: list[Victim] = []
    done: list[Victim] = []
    hung: list[str] = []
    not_started: list[str] = []
    ledgers: list[Ledger] = []
    engines.quiet = True
    try:
        while going or (started < kills and time.monotonic() < until):
            time.sleep(0.005)
            more = started < kills and time.monotonic() < until
            if more and len(going) < AT_A_TIME:
                job = job_of(started, model, engines.folder)
                going.append(Victim(job, at_work=started % 4 != 0))
                engines.start(going[-1].job)
                started += 1
            if len(ledgers) < RANKS:
                with contextlib.suppress(LedgerError):  # nobody has made them yet
                    ledgers = _open(engines.folder)
                continue
            for ledger in ledgers:
                ledger.reap()
            for victim in list(going):
                victim.at_work &= time.monotonic() < until  # no time left to wait for its requests
                _advance(victim, ledgers, engines, draw)
                if victim.killed_at and time.monotonic() - victim.killed_at > HANG_S:
                    hung.append(victim.job.name)
                    going.remove(victim)
                elif victim.free_s is not None and victim.front_s is not None:
                    done.append(victim)
                    going.remove(victim)
                elif victim.killed_at is None and not engines.alive(victim.job):
                    not_started.append(victim.job.name)  # it ended before it was killed
                    going.remove(victim)
    finally:
        engines.quiet = False
        engines.end()
    left = [sum(account.charge for account in one.snapshot().accounts) for one in ledgers]
    return {"not started": not_started} | _summary(done, hung, left)


def _open(folder: Path) -> list[Ledger]:
    return [
        Ledger.open(folder / "kill-ledger", fleet.gpu_uuid(rank), create=False)
        for rank in range(RANKS)
    ]


def _advance(
    victim: Victim, ledgers: Sequence[Ledger], engines: Fleet, draw: random.Random
) -> None:
    now = time.monotonic()
    found = [
        next((a for a in ledger.snapshot().accounts if a.name == victim.job.name), None)
        for ledger in ledgers
    ]
    if victim.killed_at is None:
        ranks = [account.members[0].pid for account in found if account and account.members]
        if len(ranks) < RANKS:
            return
        working = all(account is not None and account.in_use > 0 for account in found)
        if victim.kill_at is None:
            if victim.at_work and not working:
                return
            victim.kill_at = now + draw.uniform(0.0, WORKING_S if victim.at_work else LOADING_S)
        if now < victim.kill_at or not engines.alive(victim.job):
            return
        front = engines.pid(victim.job)
        for pid in session_processes(front):
            with contextlib.suppress(ProcessLookupError):
                victim.watched[os.pidfd_open(pid)] = pid
        victim.rank = draw.randrange(RANKS)
        victim.working = working
        victim.killed_at = time.monotonic()
        os.kill(ranks[victim.rank], signal.SIGKILL)
        return
    _note_ends(victim, engines)
    empty = all(account is None or account.charge == 0 for account in found)
    if victim.parts_s is not None and victim.free_s is None and empty:
        victim.free_s = now - victim.killed_at


def _note_ends(victim: Victim, engines: Fleet) -> None:
    assert victim.killed_at is not None
    after = time.monotonic() - victim.killed_at
    front = None
    if victim.front_s is None:
        front = engines.pid(victim.job) if engines.alive(victim.job) else None
        if front is None:
            victim.front_s = after
    poll = select.poll()
    for descriptor in victim.watched:
        poll.register(descriptor, select.POLLIN)
    for descriptor, _ in poll.poll(0):
        del victim.watched[descriptor]
        os.close(descriptor)
    if victim.parts_s is None and {*victim.watched.values()} <= {front}:
        victim.parts_s = after


def _summary(done: Sequence[Victim], hung: Sequence[str], left: Sequence[int]) -> dict[str, Any]:
    def times(values: Sequence[float | None]) -> dict[str, float]:
        known = sorted(value for value in values if value is not None)
        if not known:
            return {}
        return {"median_ms": 1e3 * statistics.median(known), "longest_ms": 1e3 * known[-1]}

    found: dict[str, Any] = {
        "kills": len(done),
        "of rank 0": sum(victim.rank == 0 for victim in done),
        "while it worked": sum(victim.working for victim in done),
        "core and ranks ended after": times([victim.parts_s for victim in done]),
        "the engine's caller ended after": times([victim.front_s for victim in done]),
        "nothing charged after": times([victim.free_s for victim in done]),
        "charged at the end": list(left),
        "hung": list(hung),
    }
    if hung or any(left):
        found["problem"] = "not every instance ended as a whole"
    return found
