"""The ledger between real processes: death, forks, stalls, and waking each other."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ledger_process import CAPACITY, MIB, Remote, wait_until

from kvcached.ledger import Ledger
from kvcached.snapshot import AccountSnapshot

DEVICE = "host:test"
JOIN = ("account = ledger.join('one', 'chat')",)
ATTACH = ("member = ledger.attach('one', 'chat')",)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "ledger", DEVICE, CAPACITY) as opened:
        yield opened


@pytest.fixture
def start(ledger: Ledger) -> Iterator[Callable[[], Remote]]:
    started: list[Remote] = []

    def start_one() -> Remote:
        started.append(Remote(ledger.path.parent))
        return started[-1]

    yield start_one
    for remote in started:
        remote.kill()


Start = Callable[[], Remote]


def only(ledger: Ledger) -> AccountSnapshot:
    (account,) = ledger.snapshot().accounts
    return account


def test_a_release_is_seen_at_once_by_others(ledger: Ledger, start: Start) -> None:
    owner, worker = start(), start()
    owner.run(*JOIN, f"account.lease({60 * MIB})")
    worker.run(*ATTACH, f"member.created({60 * MIB})")
    other = ledger.join("two", "other")
    assert other.leasable() == 40 * MIB
    worker.run(f"member.released({10 * MIB})")
    assert other.leasable() == 50 * MIB
    assert owner.run("account.charge()") == 50 * MIB


def test_a_dead_owners_members_still_count(ledger: Ledger, start: Start) -> None:
    owner, worker = start(), start()
    owner.run(*JOIN, f"account.lease({60 * MIB})")
    worker.run(*ATTACH, f"member.created({45 * MIB})")
    owner.kill()
    other = ledger.join("two", "other")  # joining reaps
    account = ledger.snapshot().account("one")
    assert account is not None
    assert (account.leased, account.created, account.charge) == (0, 45 * MIB, 45 * MIB)
    assert (account.owner_pid, account.alive, account.pids) == (None, True, (worker.pid,))
    assert other.leasable() == 55 * MIB
    worker.kill()
    assert other.lease(100 * MIB)  # a refusal reaps and tries once more
    assert len(ledger.snapshot().accounts) == 1


def test_a_dead_members_bytes_leave_the_lease(ledger: Ledger, start: Start) -> None:
    owner, worker, second = start(), start(), start()
    owner.run(*JOIN, f"account.lease({60 * MIB})")
    worker.run(*ATTACH, f"member.created({45 * MIB})", f"member.released({5 * MIB})")
    second.run(*ATTACH, f"member.created({10 * MIB})")
    worker.kill()
    assert [member.alive for member in only(ledger).members] == [False, True]
    assert ledger.reap() == 1
    account = only(ledger)
    assert (account.leased, account.created) == (15 * MIB, 10 * MIB)
    assert ledger.snapshot().reaps == 1
    third = start()
    third.run(*ATTACH, f"member.created({5 * MIB})")  # in the dead one's row
    assert (only(ledger).charge, only(ledger).created) == (15 * MIB, 15 * MIB)


def test_all_dead_and_everything_is_back(ledger: Ledger, start: Start) -> None:
    owner, worker = start(), start()
    owner.run(*JOIN, f"account.lease({60 * MIB})")
    worker.run(*ATTACH, f"member.pin({30 * MIB})")
    assert only(ledger).charge == 90 * MIB
    owner.kill()
    worker.kill()
    assert not only(ledger).alive
    assert ledger.reap() == 2
    assert ledger.snapshot().accounts == ()


FORK = (
    "import multiprocessing, signal, subprocess, sys",
    "def inherited():",
    "    assert ledger.lock_fd == -1 and account.leasable() == account.charge() == 0",
    "    account.publish(1, 1, 1); member.released(5); account.set_demand(1); member.close()",
    "    for call in (ledger.snapshot, ledger.reap, lambda: account.lease(1),",
    "                 lambda: member.pin(1), lambda: member.created(1)):",
    "        try: call()",
    "        except Exception as error: assert 'fork' in str(error), error",
    "        else: raise AssertionError(call)",
    "def fork():",
    "    pid = os.fork()",
    "    if pid: return pid",
    "    global account, member, ledger",
    "    try:",
    "        inherited(); account.close(); ledger.close(); del account, member, ledger",
    "    except BaseException as error: print(error, file=sys.stderr); os._exit(3)",
    "    while True: signal.pause()",
    "def process():",
    "    context = multiprocessing.get_context('fork')",
    "    child = context.Process(target=lambda: (inherited(), signal.pause()), daemon=True)",
    "    child.start(); return child.pid",
    "def program():",
    "    return subprocess.Popen(['sleep', '1000'], close_fds=False).pid",
)


@pytest.mark.parametrize("how", ["fork", "process", "program"])
def test_a_child_keeps_nobody_alive_and_drops_nothing(
    ledger: Ledger, start: Start, how: str
) -> None:
    parent = start()
    parent.run(*JOIN, *ATTACH, f"account.lease({60 * MIB})", f"member.created({60 * MIB})")
    child = parent.run(*FORK, f"{how}()")
    try:
        time.sleep(0.1)
        assert Path(f"/proc/{child}/status").read_text().split("State:\t")[1][0] in "SR"
        assert ledger.reap() == 0
        account = only(ledger)
        assert (account.owner_alive, account.members[0].alive) == (True, True)
        assert (account.charge, account.demand) == (60 * MIB, 0)
        assert parent.run(f"account.lease({MIB})")
        parent.kill()
        assert not only(ledger).alive
        assert ledger.reap() == 2
        assert ledger.snapshot().accounts == ()
        assert Path(f"/proc/{child}").exists()
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_child_opens_its_own_handle(ledger: Ledger, start: Start) -> None:
    parent = start()
    parent.run(*JOIN, f"account.lease({60 * MIB})")
    code = parent.run(
        "pid = os.fork()",
        "if pid == 0:",
        "    from kvcached.ledger import Ledger",
        "    own = Ledger.open(ledger.path.parent, 'host:test')",
        "    account = own.join('two', 'x')",
        "    os._exit(0 if account.leasable() == 40 << 20 else 1)",
        "os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])",
    )
    assert code == 0
    assert ledger.reap() == 1
    assert only(ledger).charge == 60 * MIB


def test_the_lock_of_a_killed_holder_is_stolen(ledger: Ledger, start: Start) -> None:
    account = ledger.join("two", "other")
    for _ in range(3):
        holder = start()
        holder.send("ledger.core.hold_lock(60.0)")
        wait_until(lambda: not ledger.snapshot().consistent)
        holder.kill()
        begin = time.monotonic()
        assert account.lease(MIB)
        assert time.monotonic() - begin < 0.1
    seen = ledger.snapshot()
    assert (seen.locks_stolen, seen.lock_timeouts) == (3, 0)


def test_a_waiter_takes_the_lock_over_when_its_holder_dies(ledger: Ledger, start: Start) -> None:
    holder, waiter = start(), start()
    waiter.run(*JOIN)
    holder.send("ledger.core.hold_lock(60.0)")
    wait_until(lambda: not ledger.snapshot().consistent)
    waiter.send(f"account.lease({MIB})")
    time.sleep(0.05)
    holder.kill()
    assert waiter.answer() is True


def test_a_stalled_holder_costs_a_shortage_and_a_counter(ledger: Ledger, start: Start) -> None:
    holder = start()
    account = ledger.join("two", "other")
    holder.send("ledger.core.hold_lock(0.3)")
    wait_until(lambda: not ledger.snapshot().consistent)
    holder.stop()
    begin = time.monotonic()
    assert not account.lease(MIB)
    assert 0.15 < time.monotonic() - begin < 0.5
    begin = time.monotonic()
    for _ in range(10):  # who stalled once is not waited for again
        assert not account.lease(MIB)
    assert time.monotonic() - begin < 0.2
    assert ledger.snapshot().lock_timeouts == 11
    assert only(ledger).lock_timeouts == 11
    assert account.leasable() == 100 * MIB  # reading needs no lock
    holder.signal(signal.SIGCONT)
    assert holder.answer() is True
    assert account.lease(MIB)
    assert ledger.snapshot().locks_stolen == 0


def test_waiters_sleep_until_another_process_wakes_them(ledger: Ledger, start: Start) -> None:
    other = start()
    account, member = ledger.join("two", "other"), ledger.attach("two", "other")
    other.run(
        "import time",
        *JOIN,
        "def latencies(sequence, wait):",
        "    seen, out = sequence(), []",
        "    for _ in range(50):",
        "        seen = wait(seen, 5.0)",
        "        out.append(time.monotonic_ns())",
        "    return out",
        "None",
    )
    for bell in ("freed", "pressure"):
        other.send(f"latencies(lambda: account.{bell}_seq, account.wait_{bell})")
        time.sleep(0.05)
        rung = []
        for i in range(50):
            time.sleep(0.004)
            assert account.lease(MIB)
            member.created(MIB)
            rung.append(time.monotonic_ns())
            member.released(MIB) if bell == "freed" else account.set_demand(i + 1)
            if bell == "pressure":
                member.released(MIB)
        heard = other.answer()
        delays = sorted(b - a for a, b in zip(rung, heard, strict=True))
        assert 0 < delays[25] < 20_000_000, delays
        print(f"{bell}: median wake {delays[25] / 1000:.0f} us, worst {delays[-1] / 1000:.0f} us")
    assert other.run("account.others_demand()") == 50


def test_a_refused_lease_with_a_demand_raises_the_pressure(ledger: Ledger, start: Start) -> None:
    hungry = start()
    account = ledger.join("two", "other")
    assert account.lease(90 * MIB)
    seen = account.pressure_seq
    assert hungry.run(*JOIN, f"account.lease({20 * MIB})") is False
    assert account.wait_pressure(seen, 0.0) == seen
    hungry.run(f"account.set_demand({20 * MIB})")
    seen = account.wait_pressure(seen, 5.0)
    assert account.others_demand() == 20 * MIB
    hungry.run(f"account.lease({20 * MIB})")
    assert account.wait_pressure(seen, 5.0) == seen + 1
    hungry.kill()
    ledger.reap()
    assert account.others_demand() == 0


def test_settings_wake_and_count_everywhere(ledger: Ledger, start: Start) -> None:
    remote = start()
    remote.run(*JOIN, "account.leasable()")
    remote.send("seen = account.freed_seq", "account.wait_freed(seen, 20.0) - seen")
    time.sleep(0.1)
    ledger.set_limit("chat", 30 * MIB)
    assert remote.answer() == 1
    assert remote.run("account.leasable()") == 30 * MIB


def test_closing_wakes_this_process_waiters(ledger: Ledger, start: Start) -> None:
    remote = start()
    begin = time.monotonic()
    remote.run(
        "import threading",
        *JOIN,
        "watch = lambda: account.wait_pressure(account.pressure_seq, 60.0)",
        "thread = threading.Thread(target=watch); thread.start()",
        "import time; time.sleep(0.1)",
        "ledger.close(); thread.join()",
    )
    assert time.monotonic() - begin < 5
    assert ledger.snapshot().accounts == ()


def test_the_lock_has_a_low_number(start: Start) -> None:
    assert start().run("os.memfd_create('pages') - ledger.lock_fd") == 1


def test_threads_share_one_handle(ledger: Ledger, start: Start) -> None:
    remote = start()
    granted = remote.run(
        "import threading",
        *JOIN,
        *ATTACH,
        "count = [0] * 4",
        "def work(i):",
        "    for _ in range(3000):",
        f"        if account.lease({30 * MIB}):",
        "            count[i] += 1",
        f"            member.created({30 * MIB})",
        "            account.leasable()",
        f"            member.released({30 * MIB})",
        "threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]",
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]",
        "sum(count)",
    )
    account = only(ledger)
    assert (account.charge, account.granted) == (0, granted)
    assert account.granted + account.refused == 12000
    assert ledger.snapshot().high_water <= CAPACITY


def test_a_slot_of_a_dead_lock_holder_can_be_taken(ledger: Ledger, start: Start) -> None:
    holder = start()
    holder.send("ledger.core.hold_lock(60.0)")
    wait_until(lambda: not ledger.snapshot().consistent)
    holder.kill()
    handles = [Ledger.open(ledger.path.parent, DEVICE) for _ in range(8)]
    assert handles[-1].join("two", "other").lease(MIB)
    for handle in handles:
        handle.close()


def shared_memory_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Shmem:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no Shmem in /proc/meminfo")


def lock_is_held(fd: int, byte: int) -> bool:
    query = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, (1 << 40) + byte, 1, 0)
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, query)
    return bool(struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK)


def test_memory_above_the_lock_is_gone_when_the_lock_falls(ledger: Ledger, start: Start) -> None:
    """Why Member.lock_fd exists: whoever sees a member dead may lend its bytes at once.

    The other way round the lock falls with nearly all of the memory still there.
    """
    size = 256 * MIB
    late = []
    reader = os.open(ledger.path, os.O_RDONLY)
    try:
        for _ in range(3):
            worker = start()
            before = shared_memory_bytes()
            worker.run(
                *ATTACH,
                "import fcntl",
                "low = os.memfd_create('pages')",
                "fd = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, member.lock_fd + 1); os.close(low)",
                f"os.posix_fallocate(fd, 0, {size})",
            )
            assert shared_memory_bytes() - before > 0.9 * size
            assert lock_is_held(reader, 64)  # the first member of the first account
            os.kill(worker.pid, signal.SIGKILL)
            while lock_is_held(reader, 64):
                pass
            late.append(max(0, shared_memory_bytes() - before))
            worker.process.wait()
            ledger.reap()
            if late[-1] < 0.1 * size:
                break
    finally:
        os.close(reader)
    # Other programs may use shared memory meanwhile: one good run of three is enough.
    assert min(late) < 0.1 * size, late
