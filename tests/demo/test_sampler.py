"""The sampler counts what the kernel counts, sees memory go, and keeps nothing alive."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvcached.demo.sampler import Sampler, SamplerError

MIB = 1 << 20

HOLDER = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
pool = os.memfd_create("kvcached:test")
other = os.memfd_create("somebody-else")
os.posix_fallocate(other, 0, 5 << 20)
child = os.fork()  # holds the same memfd: it must count once
if child == 0:
    sys.stdin.buffer.raw.readinto(bytearray(0)); import signal; signal.pause()
for line in sys.stdin:
    word, *numbers = line.split()
    if word == "take":
        os.posix_fallocate(pool, int(numbers[0]) << 20, int(numbers[1]) << 20)
    elif word == "punch":
        at, size = (int(number) << 20 for number in numbers)
        assert libc.fallocate(pool, 3, ctypes.c_long(at), ctypes.c_long(size)) == 0
    elif word == "more":
        again = os.memfd_create("kvcached:second")
        os.posix_fallocate(again, 0, int(numbers[0]) << 20)
    print("ok", flush=True)
os.kill(child, 9)
"""


def _until(check: Callable[[], bool], limit_s: float = 5.0) -> bool:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if check():
            return True
        time.sleep(0.02)
    return check()


def test_counts_allocated_blocks_of_our_memfds_once(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert holder.stdin and holder.stdout

    def tell(text: str) -> None:
        assert holder.stdin and holder.stdout
        holder.stdin.write(text + "\n")
        holder.stdin.flush()
        assert holder.stdout.readline() == "ok\n"

    try:
        with Sampler([holder.pid], tmp_path / "samples") as sampler:

            def holds(size_mib: int) -> bool:
                latest = sampler.latest()
                return latest is not None and latest.engine_bytes == (size_mib * MIB,)

            tell("take 0 4")
            assert _until(lambda: holds(4))
            tell("take 8 4")
            assert _until(lambda: holds(8))
            tell("punch 1 2")
            assert _until(lambda: holds(6))
            tell("more 3")
            assert _until(lambda: holds(9))
            samples = sampler.stop()
        assert max(sample.total for sample in samples) == 9 * MIB
        assert samples == sorted(samples, key=lambda sample: sample.at_s)
    finally:
        holder.stdin.close()
        holder.wait(5)
        holder.stdout.close()


def test_an_engine_that_is_gone_holds_nothing(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", "pass"], start_new_session=True)
    gone.wait()
    with Sampler([gone.pid], tmp_path / "samples") as sampler:
        assert _until(lambda: sampler.latest() is not None)
        assert all(sample.total == 0 for sample in sampler.stop())


@pytest.mark.parametrize("count", [1, 3])
def test_nothing_is_lost_in_the_file(tmp_path: Path, count: int) -> None:
    with Sampler([1 << 22] * count, tmp_path / "samples") as sampler:
        assert _until(lambda: sampler.latest() is not None)
        time.sleep(0.3)
        samples = sampler.stop()
    assert len(samples) > 20
    assert all(len(sample.engine_bytes) == count for sample in samples)


def test_a_sampler_that_died_is_an_error(tmp_path: Path) -> None:
    with Sampler([1 << 22], tmp_path / "samples") as sampler:
        assert _until(lambda: sampler.latest() is not None)
        sampler._process.kill()
        with pytest.raises(SamplerError):
            sampler.stop()
