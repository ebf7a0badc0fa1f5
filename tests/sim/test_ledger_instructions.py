"""The ledger at every single instruction: a process is stepped through each operation.

Whoever looks between two instructions must see numbers that are valid, and whoever is killed there
must leave a ledger that the others can go on with.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvcached import vmm_ops
from kvcached.errors import InvalidArgumentError
from kvcached.ledger import Account, Ledger, Member

DEVICE = "host:steps"
LENDABLE = 1000
MEMBER_HOLDS = 100  # of the stepped instance, in this process
OTHER_HOLDS = 300  # of another instance
LOCK_OFFSET = 256  # of the lock in the file (segment_layout.hpp)

PTRACE_TRACEME, PTRACE_SINGLESTEP = 0, 9
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long] * 4

OPEN = vmm_ops.Segment.open
PATH: list[Path] = []  # of the bench's ledger, for the one operation that has no ledger yet

Operation = Callable[[Ledger, Account | None, Member | None], Any]
# What is done, in which state: with an account that leases 200, with a member that holds 50 of it.
OPERATIONS: dict[str, tuple[bool, bool, Operation]] = {
    "open": (False, False, lambda ledger, a, m: OPEN(str(PATH[0]), DEVICE, -1, 0, True, False)),
    "join": (False, False, lambda ledger, a, m: ledger.join("one", "one", 10)),
    "join anew": (False, False, lambda ledger, a, m: ledger.join("three", "three", 10)),
    "attach": (False, False, lambda ledger, a, m: ledger.attach("one", "one", 10)),
    "reap": (False, False, lambda ledger, a, m: ledger.reap()),
    "lease": (True, False, lambda ledger, a, m: a.lease(40)),
    "refused lease": (True, False, lambda ledger, a, m: a.lease(2000)),
    "give back": (True, False, lambda ledger, a, m: a.give_back(30)),
    "pin": (False, True, lambda ledger, a, m: m.pin(20)),
    "pin with owner": (True, True, lambda ledger, a, m: m.pin(20)),
    "created": (True, True, lambda ledger, a, m: m.created(20)),
    "released": (True, True, lambda ledger, a, m: m.released(20)),
    "close account": (True, True, lambda ledger, a, m: a.close()),
    "close member": (True, True, lambda ledger, a, m: m.close()),
    "close ledger": (True, True, lambda ledger, a, m: ledger.close()),
    "set guarantee": (True, False, lambda ledger, a, m: ledger.set_guarantee("one", 400)),
    "set capacity": (False, False, lambda ledger, a, m: ledger.set_capacity(LENDABLE + 100)),
    "set limit": (True, False, lambda ledger, a, m: ledger.set_limit("one", 500)),
    "set weight": (True, False, lambda ledger, a, m: ledger.set_weight("one", 2.0)),
    "set foreign": (True, False, lambda ledger, a, m: ledger.set_foreign(50)),
    "ask back": (True, False, lambda ledger, a, m: ledger.ask_back("one", 30)),
    "answer": (True, False, lambda ledger, a, m: a.answer(30)),
    "demand": (True, False, lambda ledger, a, m: a.set_demand(70)),
    "press": (True, False, lambda ledger, a, m: a.press()),
    "publish": (True, False, lambda ledger, a, m: a.publish(40, 20, 10, True)),
    "publish cache": (True, False, lambda ledger, a, m: a.publish_cache(1, 2, 3, 4)),
    "describe": (True, False, lambda ledger, a, m: a.describe(16, 16, 64)),
    "count reclaimed": (True, False, lambda ledger, a, m: a.count_reclaimed(10)),
    "set ready": (True, False, lambda ledger, a, m: a.set_ready()),
    "set aside": (True, True, lambda ledger, a, m: m.set_aside(60)),
    "set aside, refused": (True, True, lambda ledger, a, m: m.set_aside(5000)),
    "member's demand": (True, True, lambda ledger, a, m: m.set_demand(60)),
    "refused pin": (True, True, lambda ledger, a, m: m.pin(5000)),
    # What the process waits for has happened already, or the time is over: it tells that it sleeps.
    "wait": (True, False, lambda ledger, a, m: a.wait_freed(a.freed_seq, 0.0)),
    "read": (True, False, lambda ledger, a, m: ledger.created()),
    # With the lock of a process that died with it.
    "steal": (False, False, lambda ledger, a, m: ledger.reap()),
    "remove": (False, False, lambda ledger, a, m: vmm_ops.remove_ledger(str(PATH[0]), DEVICE)),
}
# They change nothing: a reader, and the removal of a ledger that others use.
SILENT = ("open", "read", "remove")


class Bench:
    """A ledger with an instance that is stepped, one of its members, and another instance."""

    def __init__(self, directory: Path) -> None:
        self.ledger = Ledger.open(directory / "ledger", DEVICE, LENDABLE)
        self.member = self.ledger.attach("one", "one")
        assert self.member.pin(MEMBER_HOLDS)
        self.other = self.ledger.join("two", "two")
        assert self.other.lease(OTHER_HOLDS)
        self.child = 0
        PATH[:] = [directory / "ledger"]
        self.file = os.open(self.ledger.path, os.O_RDONLY)

    def bytes(self) -> bytes:
        """What the ledger's first rows say, settings and lock included."""
        return os.pread(self.file, 8192, 0)

    def start(self, operation: str) -> None:
        """Forks a process that stands right before the operation."""
        owner, maps, call = OPERATIONS[operation]
        if not owner and not maps:
            self.leave_dead()  # for the operations that reap
        if operation == "steal":
            self.leave_lock()
        self.child = os.fork()
        if self.child == 0:
            try:
                ledger = Ledger.open(self.ledger.path.parent, DEVICE)
                account = ledger.join("one", "one") if owner else None
                member = ledger.attach("one", "one") if maps else None
                if account is not None:
                    account.lease(200)
                if member is not None:
                    member.created(50) if account else member.pin(50)
                libc.ptrace(PTRACE_TRACEME, 0, 0, 0)
                os.kill(os.getpid(), signal.SIGSTOP)
                keep = self.quietly(call, ledger, account, member)
                os.kill(os.getpid(), signal.SIGSTOP)
                del keep
            finally:
                os._exit(1)
        _, status = os.waitpid(self.child, os.WUNTRACED)
        assert os.WIFSTOPPED(status), "the child failed before the operation"

    @staticmethod
    def quietly(call: Operation, *arguments: Any) -> Any:
        """The removal of a ledger in use is refused: that is an answer too."""
        try:
            return call(*arguments)
        except InvalidArgumentError:
            return None

    def leave_dead(self) -> None:
        """Leaves the rows of a dead member here, and of a dead owner and member elsewhere."""
        child = os.fork()
        if child == 0:
            ledger = Ledger.open(self.ledger.path.parent, DEVICE)
            keep = [ledger.attach("one", "one"), ledger.attach("four", "four")]
            done = all(member.pin(25) for member in keep)
            account = ledger.join("four", "four")
            os._exit(0 if done and account.lease(100) else 1)
        assert os.waitpid(child, 0)[1] == 0

    def leave_lock(self) -> None:
        """Leaves the lock with a process that is dead."""
        child = os.fork()
        if child == 0:
            Ledger.open(self.ledger.path.parent, DEVICE).core.hold_lock(60.0)
            os._exit(1)
        while os.pread(self.file, 4, LOCK_OFFSET) == bytes(4):
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

    def step(self) -> bool:
        """One instruction further; False when the operation is through."""
        if libc.ptrace(PTRACE_SINGLESTEP, self.child, 0, 0) != 0:
            pytest.skip(f"no single stepping here: {os.strerror(ctypes.get_errno())}")
        _, status = os.waitpid(self.child, os.WUNTRACED)
        assert os.WIFSTOPPED(status), f"the child ended: {status}"
        return os.WSTOPSIG(status) != signal.SIGSTOP

    def kill(self) -> None:
        os.kill(self.child, signal.SIGKILL)
        os.waitpid(self.child, 0)

    def charges(self) -> dict[str, int]:
        """What each account is charged; checks what always holds."""
        raw = self.ledger.core.snapshot()
        charges = {}
        for account in raw["accounts"]:
            charges[account["instance"]] = account["charge"]
            assert account["charge"] >= account["created"] >= 0
        total = sum(charges.values())
        assert total <= raw["high_water"] <= LENDABLE
        assert charges["two"] == OTHER_HOLDS
        assert charges["one"] >= MEMBER_HOLDS
        return charges

    def recover(self) -> None:
        """What the survivors find after the child's death."""
        self.kill()
        self.ledger.set_capacity(LENDABLE)
        self.ledger.set_guarantee("one", 0)
        self.ledger.set_limit("one", None)
        self.ledger.set_foreign(0)
        assert self.other.lease(LENDABLE - OTHER_HOLDS - MEMBER_HOLDS)  # steals and reaps
        self.ledger.reap()  # an empty row does not stand in the way of a lease
        raw = self.ledger.core.snapshot()
        charges = {each["instance"]: each["charge"] for each in raw["accounts"]}
        assert charges == {"one": MEMBER_HOLDS, "two": LENDABLE - MEMBER_HOLDS}
        self.other.give_back(LENDABLE - OTHER_HOLDS - MEMBER_HOLDS)
        assert self.member.held() == MEMBER_HOLDS
        assert self.ledger.snapshot().lock_timeouts == 0


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.ledger.close()
    os.close(bench.file)


def watch(bench: Bench, operation: str) -> list[int]:
    """Steps through all of it; returns the steps before and after which the ledger differs."""
    bench.start(operation)
    before = last = bench.bytes()
    first = bench.charges()
    seen = [first]
    changes = []
    steps = 0
    while bench.step():
        steps += 1
        now = bench.bytes()
        if now == last:
            continue
        changes.append(steps)
        last = now
        charges = bench.charges()
        seen.append(charges)
    final = seen[-1]
    for charges in seen:  # nothing between what was and what is
        assert set(charges) <= set(first) | set(final)  # no half-written row
        for key in set(first) | set(final):
            values = (first.get(key, 0), final.get(key, 0))
            assert min(values) <= charges.get(key, 0) <= max(values)
    assert operation in SILENT or last != before
    bench.recover()
    return changes


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_instant_is_valid(bench: Bench, operation: str) -> None:
    changes = watch(bench, operation)
    print(f"{operation}: {len(changes)} changes within {changes[-1] if changes else 0} steps")


def killed_after(bench: Bench, operation: str, changes: int) -> bool:
    """Kills the process right after the ledger has changed so often; False if it never did."""
    bench.start(operation)
    last = bench.bytes()
    going = True
    while changes and (going := bench.step()):
        now = bench.bytes()
        changes -= now != last
        last = now
    bench.recover()
    return going


SAMPLE = ("join anew", "reap", "lease", "pin with owner", "close account")


@pytest.mark.parametrize(
    "operation",
    [key if key in SAMPLE else pytest.param(key, marks=pytest.mark.slow) for key in OPERATIONS],
)
def test_killed_after_any_store(bench: Bench, operation: str) -> None:
    """All that a dead process leaves behind is what it stored: so every store is a last one."""
    changes = 1
    while killed_after(bench, operation, changes):
        changes += 1
