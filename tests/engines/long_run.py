"""Two real servers under one budget for hours: load, kills, stops, limits, reclaims (``make
long-run SECONDS=7200 SEED=1``). Prints what happened as JSON; ends with 1 where something was lost.

- A request may fail only if its own server was killed while it ran. Every answer must be right.
- Physical memory and the ledger's mark never exceed the budget.
- Processes that live long keep their number of descriptors and mappings; nothing of ours is left
  in shared memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness import (
    HERE,
    MAX_TOKENS,
    MIB,
    Load,
    Pair,
    Server,
    environment,
    p99,
    wait_until,
)
from plain import answers_of_plain_vllm

from kvcached.errors import KvcachedError
from kvcached.ledger import Ledger
from kvcached.processes import session_processes

CAPACITY = 12 * MIB
KINDS = ("api", "core", "worker")
WARM_S = 45.0  # after so long a process has what it needs
TELL_S = 60.0
RESTART_S = 900.0  # that a restart may take: two cores carry the other server's load meanwhile
FDS_MORE, MAPPINGS_MORE = 12, 200  # that a process may have more than then: connections, arenas


@dataclass(slots=True)
class Footprint:
    """What one process has, first when it was warm and last."""

    kind: str
    seen_s: float
    first: tuple[int, int, int] | None = None  # descriptors, mappings, resident KiB
    last: tuple[int, int, int] | None = None
    samples: int = 0


def footprint(pid: int) -> tuple[int, int, int] | None:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        resident = int(status.split("VmRSS:")[1].split()[0])
        mappings = Path(f"/proc/{pid}/maps").read_text().count("\n")
        return len(os.listdir(f"/proc/{pid}/fd")), mappings, resident
    except (OSError, IndexError):
        return None  # it has just ended


@dataclass(slots=True)
class Outcome:
    answered: int = 0
    failed_with_their_server: int = 0
    lost: list[str] = field(default_factory=list)
    wrong: int = 0
    ttft_s: list[float] = field(default_factory=list)


class LongRun:
    def __init__(self, pair: Pair, expected: Sequence[Sequence[int]], seed: int) -> None:
        self.pair, self.expected = pair, expected
        self.dice = random.Random(seed)
        self.events: Counter[str] = Counter()
        self.outcome = Outcome()
        self.loads: dict[str, Load] = {}
        self.footprints: dict[int, Footprint] = {}
        self.restarts_s: list[float] = []
        self.told_s = 0.0

    def run(self, seconds: float) -> None:
        start = time.monotonic()
        for server in self.servers():
            self.start_load(server)
        while time.monotonic() - start < seconds:
            time.sleep(self.dice.uniform(1.0, 6.0))
            event = self.dice.choices(
                [self.kill, self.stop, self.limit, self.guarantee, self.reclaim, self.rest],
                [3, 3, 6, 2, 6, 2],
            )[0]
            self.events[event.__name__] += 1
            event(self.dice.choice(self.servers()))
            self.look()
            self.tell(time.monotonic() - start)
        for server in self.servers():
            self.end_load(server, killed=False)

    def servers(self) -> list[Server]:
        return [self.pair.a, self.pair.b]

    def start_load(self, server: Server) -> None:
        load = Load(server, 4 if server is self.pair.a else 2, self.dice.choice([8, MAX_TOKENS]))
        load.__enter__()
        self.loads[server.name] = load

    def end_load(self, server: Server, killed: bool) -> None:
        load = self.loads.pop(server.name)
        load.__exit__(None, None, None)
        failures = load.failures()
        self.outcome.answered += len(load.answers) - len(failures)
        self.outcome.wrong += len(load.wrong(self.expected))
        self.outcome.ttft_s += load.ttft_s()
        if killed:
            self.outcome.failed_with_their_server += len(failures)
        else:
            self.outcome.lost += failures

    # --- events

    def kill(self, server: Server) -> None:
        """Any one of its processes; the load of the other server goes on all the time."""
        before = self.loads[server.name].failures()
        self.outcome.lost += before  # nothing has been killed yet
        what = self.dice.choice(KINDS)
        self.events[f"kill {what}"] += 1
        pids = self.pair.pids(server)
        os.kill(pids[what], signal.SIGKILL)
        wait_until(lambda: not session_processes(server.session), 20, f"{server.name} has ended")
        self.end_load(server, killed=True)
        self.outcome.failed_with_their_server -= len(before)
        before_start = time.monotonic()
        server.start()
        server.wait(RESTART_S)
        self.restarts_s.append(time.monotonic() - before_start)
        self.start_load(server)

    def stop(self, server: Server) -> None:
        pid = self.pair.pids(server)[self.dice.choice(["core", "worker"])]
        os.kill(pid, signal.SIGSTOP)
        time.sleep(self.dice.uniform(0.1, 1.5))
        os.kill(pid, signal.SIGCONT)

    def limit(self, server: Server) -> None:
        size = None if self.dice.random() < 0.4 else self.dice.randint(6, 12) * MIB
        self.set(lambda: self.pair.ledger.set_limit(server.name, size))

    def guarantee(self, server: Server) -> None:
        size = self.dice.randint(0, 3) * MIB
        self.set(lambda: self.pair.ledger.set_guarantee(server.name, size))

    def reclaim(self, server: Server) -> None:
        size = self.dice.randint(1, 12) * MIB
        self.set(lambda: self.pair.ledger.ask_back(server.name, size))

    def set(self, change: Callable[[], None]) -> None:
        with contextlib.suppress(KvcachedError):  # a guarantee above a limit, say
            change()

    def rest(self, server: Server) -> None:
        """One of them has nothing to do for a while."""
        self.end_load(server, killed=False)
        time.sleep(self.dice.uniform(1.0, 5.0))
        self.start_load(server)

    def tell(self, seconds: float) -> None:
        """A line a minute."""
        if seconds < self.told_s + TELL_S:
            return
        self.told_s = seconds
        outcome = self.outcome
        print(
            f"[{seconds:6.0f} s] answered {outcome.answered}, failed with their server "
            f"{outcome.failed_with_their_server}, lost {len(outcome.lost)}, wrong {outcome.wrong}, "
            f"kills {self.events['kill']}, stops {self.events['stop']}",
            file=sys.stderr,
            flush=True,
        )

    # --- what must hold

    def look(self) -> None:
        now = time.monotonic()
        assert self.pair.ledger.snapshot().high_water <= self.pair.capacity
        for server in self.servers():
            for kind, pid in self.pair.pids(server).items():
                each = self.footprints.setdefault(pid, Footprint(f"{server.name} {kind}", now))
                found = footprint(pid)
                if found is None or now - each.seen_s < WARM_S:
                    continue
                each.first = each.first or found
                each.last = found
                each.samples += 1

    def growth(self) -> list[dict[str, object]]:
        """Of the processes that lived long enough, what they have more than when they were warm."""
        rows: list[dict[str, object]] = []
        for each in self.footprints.values():
            if each.first is None or each.last is None or each.samples < 3:
                continue
            more = [last - first for first, last in zip(each.first, each.last, strict=True)]
            rows.append(
                {
                    "process": each.kind,
                    "samples": each.samples,
                    "descriptors": more[0],
                    "mappings": more[1],
                    "resident_kib": more[2],
                    "of_kib": each.first[2],
                }
            )
        return rows


def ours_in_shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if "kvcached" in name}


def long_run(seconds: float, seed: int, folder: Path) -> int:
    model = folder / "tiny"
    command = [sys.executable, str(HERE / "tiny_model.py"), str(model)]
    subprocess.run(command, env=environment({}), check=True, capture_output=True)
    expected = answers_of_plain_vllm(model, folder / "plain")
    before = ours_in_shared_memory()
    pair = Pair(model, folder / "pair", capacity=CAPACITY)
    run = LongRun(pair, expected, seed)
    start, problem = time.monotonic(), ""
    try:
        pair.up()
        with pair.watch() as memory:
            try:
                run.run(seconds)
            except Exception:  # noqa: BLE001 - what it saw until then is told all the same
                problem = traceback.format_exc()
                print(problem, file=sys.stderr)
    finally:
        pair.close()
    with Ledger.open(*pair.place, create=False) as ledger:
        ledger.reap()
        seen = ledger.snapshot()
    growth = run.growth()
    leaks = [
        row
        for row in growth
        if int(str(row["descriptors"])) > FDS_MORE or int(str(row["mappings"])) > MAPPINGS_MORE
    ]
    left = sorted(ours_in_shared_memory() - before)
    outcome = run.outcome
    report = {
        "seconds": round(time.monotonic() - start),
        "seed": seed,
        "events": dict(run.events),
        "answered": outcome.answered,
        "failed_with_their_server": outcome.failed_with_their_server,
        "lost": outcome.lost[:5],
        "wrong": outcome.wrong,
        "ttft_p99_ms": round(p99(outcome.ttft_s) * 1e3),
        "restart_s": {
            "median": round(statistics.median(run.restarts_s or [0.0]), 1),
            "longest": round(max(run.restarts_s, default=0.0), 1),
        },
        "capacity": CAPACITY,
        "peak_bytes": memory.peak,
        "high_water": seen.high_water,
        "accounts_left": len(seen.accounts),
        "growth": growth,
        "leaks": leaks,
        "left_in_shared_memory": left,
        "problem": problem,
    }
    print(json.dumps(report, indent=1))
    bad = problem or outcome.lost or outcome.wrong or leaks or left or seen.accounts
    return 1 if bad or memory.peak > CAPACITY or seen.high_water > CAPACITY else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="two real servers under load, for long")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the servers end with it
    with tempfile.TemporaryDirectory(prefix="kvcached-long-") as folder:
        return long_run(options.seconds, options.seed, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
