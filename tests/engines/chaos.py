"""Stops and kills of the processes of a live engine, and what is measured around them."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import PROMPTS, TWO_LONGEST_BYTES, Load, Pair, p99, wait_until

from kvcached.processes import session_processes

KINDS = ("api", "core", "worker")
# How long an instance may outlive any one of its processes.
END_LIMIT_S = 1.0
LATE_S = 0.9  # of a process that lives on so long it is noted what its threads do

Times = dict[str, float]


@dataclass(frozen=True, slots=True)
class Kill:
    """What one kill did. Times are seconds; ``ends_s`` counts from the signal, by process."""

    what: str
    ends_s: Times
    free_s: float
    """From the end of the worker, the process that maps, until what it held could be leased."""
    nothing_s: float
    """From there until the instance was charged nothing at all."""
    b_ttft_s: list[float]
    late: list[str]
    """What the threads of those who were late were doing, as the kernel tells it."""

    @property
    def gone_s(self) -> float:
        """From the signal until the last process of the engine had ended."""
        return max(self.ends_s[kind] for kind in KINDS)

    def __str__(self) -> str:
        ends = ", ".join(f"{name} {s * 1e3:.0f}" for name, s in self.ends_s.items())
        return (
            f"kill {self.what}: ended after ms: {ends}; the worker's bytes leasable "
            f"{self.free_s * 1e3:.0f} ms after its end, all {self.nothing_s * 1e3:.0f} ms later; "
            f"B's TTFT p99 {p99(self.b_ttft_s) * 1e3:.0f} ms"
        ) + "".join(f"\n    late: {line}" for line in self.late)


def _watched(pair: Pair) -> dict[int, str]:
    """A pidfd of every process of A's session, and what the process is."""
    kinds = {pid: kind for kind, pid in pair.pids(pair.a).items()}
    found: dict[int, str] = {}
    for pid in session_processes(pair.a.session):
        with contextlib.suppress(ProcessLookupError):
            found[os.pidfd_open(pid)] = kinds.get(pid, f"other process {pid}")
    assert {*KINDS} <= {*found.values()}
    return found


def _threads(pid: int) -> list[str]:
    """What each thread of a process does: its name, state and, for root, the kernel's stack."""
    found = []
    for task in sorted(Path(f"/proc/{pid}/task").glob("*")):
        with contextlib.suppress(OSError):
            name, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(")")
            stack = "?"
            with contextlib.suppress(PermissionError):
                lines = (task / "stack").read_text().split("\n")
                stack = " < ".join(line.split()[-1].split("+")[0] for line in lines[:5] if line)
            found.append(f"{name} {rest.split()[0]}: {stack}")
    return found


def _follow_death(
    pair: Pair, pids: Mapping[str, int], watched: dict[int, str], start: float
) -> tuple[Times, Times, list[str]]:
    """By what ended: seconds from ``start``; the same for what became free; and what those did
    who were late.
    """
    late: list[str] = []
    poll = select.poll()
    for descriptor in watched:
        poll.register(descriptor, select.POLLIN)
    ends: Times = {}
    free: Times = {}
    while len(ends) < len(watched) or "all" not in free:
        events = poll.poll(5)
        now = time.monotonic() - start
        if now > LATE_S and not late:
            left = pids.keys() - ends.keys()
            late = [f"{kind} {each}" for kind in left for each in _threads(pids[kind])]
        assert now < 20, f"{watched.values() - ends.keys()} live on; free are {free.keys()}"
        for descriptor, _ in events:
            ends[watched[descriptor]] = now
            poll.unregister(descriptor)
            os.close(descriptor)
        if "worker" not in ends:
            continue  # adding up the ledger all the time would slow down what is measured
        pair.ledger.reap()
        account = pair.ledger.snapshot().account("a")
        now = time.monotonic() - start
        if account is None or not account.members:
            free.setdefault("worker", now)
        if account is None or account.charge == 0:
            free.setdefault("all", now)
    return ends, free, late


def kill(pair: Pair, what: str, after_s: float, expected: Sequence[Sequence[int]]) -> Kill:
    """SIGKILL to one kind of process of A under load, while B is asked all the time."""
    pids = pair.pids(pair.a)
    with pair.watch() as memory, Load(pair.b, 2, 24) as b:
        with Load(pair.a, 6) as a:
            time.sleep(after_s)
            wait_until(lambda: pair.account(pair.a).charge > 2 << 20, 20, "A works")
            seen = len(b.answers)
            watched = _watched(pair)
            start = time.monotonic()
            os.kill(pids[what], signal.SIGKILL)
            ends, free, late = _follow_death(pair, pids, watched, start)
        wait_until(lambda: len(b.answers) >= seen + 4, 30, "B goes on answering")
    assert b.failures() == []
    assert b.wrong(expected) == [] and a.wrong(expected) == []
    assert memory.peak <= pair.capacity
    assert pair.ledger.snapshot().high_water <= pair.capacity
    free_s = max(0.0, free["worker"] - ends["worker"])
    return Kill(what, ends, free_s, free["all"] - free["worker"], b.ttft_s(), late)


def stop(
    pair: Pair, what: str, after_s: float, for_s: float, expected: Sequence[Sequence[int]]
) -> list[float]:
    """SIGSTOP and SIGCONT of one kind of process of A under load; B's TTFTs in seconds."""
    pid = pair.pids(pair.a)[what]
    with (
        pair.guaranteed(pair.b, TWO_LONGEST_BYTES),
        pair.watch() as memory,
        Load(pair.b, 2, 24) as b,
        Load(pair.a, 6) as a,
    ):
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
    return b.ttft_s()


def undisturbed(pair: Pair, for_s: float, expected: Sequence[Sequence[int]]) -> list[float]:
    """B's TTFTs in seconds while A is under the same load and nothing happens."""
    with Load(pair.b, 2, 24) as b, Load(pair.a, 6) as a:
        time.sleep(for_s)
    assert a.failures() == [] and b.failures() == []
    assert a.wrong(expected) == [] and b.wrong(expected) == []
    return b.ttft_s()
