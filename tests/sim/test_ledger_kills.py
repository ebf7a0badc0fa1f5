"""Several processes lease, create and release at random and are killed at random moments.

Every so often all of them are stopped, wherever they are, and everything is added up: what exists
(each process keeps its own record of it, apart from the ledger) must be charged, and what is
charged must fit. Seeded: the choices repeat, the moments do not.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvcached.ledger import Ledger

DEVICE = "host:sim"
CAPACITY = 1000
HEADROOM = 50
INSTANCES = 3
PROCESSES = 6


def owner_steps(ledger: Ledger, instance: str, record: mmap.mmap, dice: random.Random) -> None:
    """An in-process engine: it owns the account and maps the memory."""
    account = ledger.join(instance, instance, pinned_bytes=10)
    member = ledger.attach(instance, instance)
    leased = held = 0
    while True:
        size = dice.randint(1, 200)
        step = dice.random()
        if step < 0.45:
            if account.lease(size):
                leased += size
            elif dice.random() < 0.2:
                account.set_demand(size)
                account.wait_freed(account.freed_seq, 0.001)
                account.set_demand(0)
        elif step < 0.75:
            size = min(size, leased - held)
            held += size
            record[:8] = struct.pack("<q", held)  # exists from here on
            member.created(size)
        elif step < 0.78:
            size = min(size, leased - held)
            account.give_back(size)
            leased -= size
        elif step < 0.97:
            size = min(size, held)
            held -= size
            leased -= size
            record[:8] = struct.pack("<q", held)  # gone from here on
            member.released(size)
        else:
            account.publish(held, 0, 0)
            ledger.reap()
        assert member.held() == held
        assert account.charge() >= leased
        assert account.leasable() <= account.ceiling()


def worker_steps(ledger: Ledger, instance: str, record: mmap.mmap, dice: random.Random) -> None:
    """A process that maps for an instance whose scheduler may be there or not."""
    while True:
        member = ledger.attach(instance, instance, pinned_bytes=10)
        held = 0
        for _ in range(dice.randint(10, 500)):
            size = dice.randint(1, 100)
            if dice.random() < 0.5:
                if member.pin(size):
                    held += size
                    record[:8] = struct.pack("<q", held)
            else:
                size = min(size, held)
                held -= size
                record[:8] = struct.pack("<q", held)
                member.released(size)
            assert member.held() == held
        record[:8] = struct.pack("<q", 0)
        member.close()


def work(directory: str, role: str, instance: str, record: str, seed: str) -> None:
    ledger = Ledger.open(Path(directory), DEVICE, CAPACITY, HEADROOM)
    with open(record, "r+b") as file:
        shared = mmap.mmap(file.fileno(), 8)
    steps = owner_steps if role == "owner" else worker_steps
    steps(ledger, instance, shared, random.Random(int(seed)))


@dataclass
class Worker:
    process: subprocess.Popen[bytes]
    role: str
    instance: str
    record: Path

    def exists(self) -> int:
        return int(struct.unpack("<q", self.record.read_bytes())[0])


class Simulation:
    def __init__(self, directory: Path, seed: int) -> None:
        self.directory = directory
        self.dice = random.Random(seed)
        self.ledger = Ledger.open(directory / "ledger", DEVICE, CAPACITY, HEADROOM)
        self.workers: list[Worker] = []
        self.started = self.kills = self.checks = 0
        self.peak = 0

    def start(self) -> None:
        owned = {worker.instance for worker in self.workers if worker.role == "owner"}
        free = [str(i) for i in range(INSTANCES) if str(i) not in owned]
        role = "owner" if free and self.dice.random() < 0.7 else "worker"
        instance = self.dice.choice(free) if role == "owner" else str(self.dice.randrange(4))
        self.started += 1
        record = self.directory / f"record-{self.started}"
        record.write_bytes(bytes(8))
        command = [sys.executable, __file__, str(self.directory / "ledger"), role, instance]
        command += [str(record), str(self.dice.randrange(1 << 30))]
        self.workers.append(Worker(subprocess.Popen(command), role, instance, record))

    def kill(self, worker: Worker) -> None:
        worker.process.kill()
        worker.process.wait()
        self.workers.remove(worker)
        self.kills += 1

    def signal_all(self, number: signal.Signals) -> None:
        for worker in self.workers:
            worker.process.send_signal(number)

    def check(self) -> None:
        """Stops the world and adds everything up."""
        self.signal_all(signal.SIGSTOP)
        for worker in self.workers:
            status = Path(f"/proc/{worker.process.pid}/status")
            while "State:\tT" not in (text := status.read_text()):
                assert "State:\tZ" not in text, f"{worker} failed"
        seen = self.ledger.snapshot()
        assert seen.charge <= CAPACITY - HEADROOM
        assert seen.charge <= seen.high_water <= CAPACITY - HEADROOM
        exists: dict[str, int] = {}
        for worker in self.workers:
            exists[worker.instance] = exists.get(worker.instance, 0) + worker.exists()
        for instance, size in exists.items():
            account = seen.account(instance)
            assert (account.charge if account else 0) >= size
        for account in seen.accounts:
            assert account.charge >= account.created == sum(m.created for m in account.members)
        self.peak = max(self.peak, sum(exists.values()))
        self.checks += 1

    def run(self, seconds: float) -> None:
        start = time.monotonic()
        while (passed := time.monotonic() - start) < 5 * seconds:
            if passed > seconds and self.is_worth_it():
                break
            while len(self.workers) < PROCESSES:
                self.start()
            time.sleep(self.dice.uniform(0.0, 0.05))
            self.check()
            if self.dice.random() < 0.1:  # killed while stopped: at the same instruction
                self.kill(self.dice.choice(self.workers))
            self.signal_all(signal.SIGCONT)
            if self.dice.random() < 0.1:
                time.sleep(self.dice.uniform(0.0, 0.02))
                self.kill(self.dice.choice(self.workers))

    def is_worth_it(self) -> bool:
        """Whether the memory was really fought for; a busy machine needs longer for that."""
        return self.kills >= 5 and self.peak > CAPACITY // 2

    def end(self) -> None:
        """After all have died, everything can be leased again."""
        while self.workers:
            self.kill(self.workers[0])
        self.ledger.reap()
        assert self.ledger.snapshot().accounts == ()
        with self.ledger.join("last", "last") as account:
            assert account.leasable() == account.ceiling() == CAPACITY - HEADROOM
            assert account.lease(CAPACITY - HEADROOM)
        seen = self.ledger.snapshot()
        print(
            f"{self.kills} kills, {self.checks} checks, {seen.reaps} reaps, "
            f"{seen.locks_stolen} locks stolen, {seen.lock_timeouts} timeouts, "
            f"at most {self.peak} of {CAPACITY - HEADROOM} in existence"
        )
        assert self.is_worth_it()


def simulate(directory: Path, seed: int, seconds: float) -> None:
    simulation = Simulation(directory, seed)
    try:
        simulation.run(seconds)
        simulation.end()
    finally:
        for worker in simulation.workers:
            worker.process.kill()
            worker.process.wait()
        simulation.ledger.close()


def test_a_sample_of_kills(tmp_path: Path) -> None:
    simulate(tmp_path, seed=1, seconds=5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 8))
def test_many_kills(tmp_path: Path, seed: int) -> None:
    simulate(tmp_path, seed=seed, seconds=60)


if __name__ == "__main__":
    os.nice(5)
    work(*sys.argv[1:])
