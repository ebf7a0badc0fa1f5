"""Processes that end together: real processes, real deaths."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

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
