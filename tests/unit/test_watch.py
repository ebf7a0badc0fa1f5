"""Processes that end together: real processes, real deaths."""

from __future__ import annotations

import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def follower(pid: int, grace_s: float = 0.0) -> subprocess.Popen[bytes]:
    """A process that ends with ``pid`` and else would run for a minute, never giving up the GIL."""
    busy = f"from kvcached import watch; watch.end_with([{pid}], {grace_s}); print(flush=True)\n"
    busy += "n = 0\nimport sys, time\nsys.setswitchinterval(60)\nend = time.monotonic() + 60\n"
    busy += "while time.monotonic() < end: n += 1"
    process = subprocess.Popen([sys.executable, "-c", busy], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    return process


@pytest.mark.parametrize("grace_s", [0.0, 0.5])
def test_ends_with_another_process_though_its_interpreter_is_busy(grace_s: float) -> None:
    leader = subprocess.Popen(["sleep", "60"])
    process = follower(leader.pid, grace_s)
    time.sleep(0.2)
    assert process.poll() is None
    leader.kill()
    leader.wait()
    start = time.monotonic()
    assert process.wait(timeout=30) == -signal.SIGKILL
    assert time.monotonic() - start >= grace_s * 0.9


def test_ends_at_once_where_the_other_is_gone_already() -> None:
    leader = subprocess.Popen(["true"])
    leader.wait()
    process = follower(leader.pid)
    assert process.wait(timeout=30) == -signal.SIGKILL


def first() -> int:
    """The priority that is ahead of all others, or ours where the system does not let us."""
    may = subprocess.run(["nice", "-n", "-5", "true"], capture_output=True, text=True)
    return os.getpriority(os.PRIO_PROCESS, 0) if may.stderr else -20


def test_its_thread_goes_first_where_the_system_lets_it() -> None:
    """On busy cores whoever waits its turn hears of a death late."""
    leader = subprocess.Popen(["sleep", "60"])
    process = follower(leader.pid)
    expected = first()
    nice: list[int] = []
    until_s = time.monotonic() + 10
    try:
        while nice != [expected] and time.monotonic() < until_s:  # the thread has yet to begin
            paths = Path(f"/proc/{process.pid}/task").glob("*/stat")
            stats = [text for text in map(Path.read_text, paths) if "(kvcached-life)" in text]
            nice = [int(each.rpartition(")")[2].split()[16]) for each in stats]
    finally:
        leader.kill()
        leader.wait()
        process.wait(timeout=30)
    assert nice == [expected]


SESSION = """
import subprocess, sys, time
from kvcached import watch
other = subprocess.Popen(["sleep", "60"])
watch.end_with([int(sys.argv[1])])
print(other.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("own", [True, False])
def test_its_own_session_goes_first_and_no_other(own: bool) -> None:
    """``other`` is in the session of the one that ends, and tells what became of it. The session is
    theirs alone, or that of a shell that lives on.
    """
    if not Path("/proc/self/autogroup").exists():
        pytest.skip("this kernel does not share cores between sessions")
    leader = subprocess.Popen(["sleep", "60"])
    ends = [sys.executable, "-c", SESSION, str(leader.pid)]
    # A shell that does not become its last command.
    shell = ["sh", "-c", f"{shlex.join(ends)}; sleep 60"]
    with subprocess.Popen(
        ends if own else shell, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        other = int(process.stdout.readline())
        group = Path(f"/proc/{other}/autogroup")
        before = group.read_text()
        leader.kill()
        leader.wait()
        if own:
            process.wait(timeout=30)
        else:
            time.sleep(1.0)
        after = group.read_text()
        os.killpg(process.pid, signal.SIGKILL)
    assert before.endswith("nice 0\n")
    assert after.endswith(f"nice {first()}\n" if own else "nice 0\n")


THREAD = """
import ctypes, sys, threading, time
def live():
    sys.stdin.readline()
    ctypes.CDLL(None).prctl(15, b"kvcached-life")
    print(flush=True)
    sys.stdin.readline()
threading.Thread(target=live).start()
time.sleep(60)
"""


@pytest.mark.parametrize("late", [False, True])
def test_does_not_wait_for_the_memory_of_the_dead(late: bool) -> None:
    """A dying process's threads are gone long before its memory: the death of the one that watches
    is enough. Here it dies alone, which makes the order certain. ``late``: it comes later than who
    watches it, as processes of an instance start in any order. What is left of the dead goes first.
    """
    if tuple(int(n) for n in platform.release().split(".")[:2]) < (6, 9):
        pytest.skip("the kernel is older than 6.9 and has no pidfd of a thread")
    command = [sys.executable, "-c", THREAD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as leader:
        assert leader.stdin is not None and leader.stdout is not None

        def step() -> None:
            assert leader.stdin is not None
            leader.stdin.write(b"\n")
            leader.stdin.flush()

        if late:
            process = follower(leader.pid)
            step()
        else:
            step()
            leader.stdout.readline()
            process = follower(leader.pid)
        time.sleep(2.0 if late else 0.5)  # it looks again after 0.25, 0.5 and 1 s
        assert process.poll() is None
        step()
        assert process.wait(timeout=30) == -signal.SIGKILL
        assert leader.poll() is None
        assert os.getpriority(os.PRIO_PROCESS, leader.pid) == first()
        leader.kill()
