"""A ledger whose numbers somebody has overwritten while it is in use: answers or errors, no more.

The file is closed to other users, so this is a program of the same user that has gone astray. The
C++ side of it is fuzzed with sanitizers (tests/native/fuzz_ledger.cpp); here it is what Python
makes of the numbers: the policy, the snapshot, the commands.
"""

from __future__ import annotations

import json
import math
import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from kvctl_runs import Run

from kvcached.errors import InvalidArgumentError, KvcachedError
from kvcached.ledger import Account, Ledger, Member

MIB = 1 << 20
DEVICE = "host:tampered"
HEADER, ROW, LOCK = 640, 1536, 256  # bytes (segment_layout.hpp)
WEIGHT = HEADER + 128 + 16  # of the first row
MOST = 1 << 50


def as_word(value: float) -> int:
    word: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return word


WORDS = [
    *(0, 1, -1, 4096, 1 << 30, 1 << 62, -(1 << 62), (1 << 63) - 1, -(1 << 63)),
    *(as_word(value) for value in (math.nan, math.inf, -math.inf, -1.0, 1e300, 5e-324)),
]


class Bench:
    def __init__(self, folder: Path) -> None:
        self.ledger = Ledger.open(folder, DEVICE, 1 << 30)
        self.account: Account = self.ledger.join("a", "one", 4096)
        self.member: Member = self.ledger.attach("a", "one")
        self.other: Account = self.ledger.join("b", "two")
        assert self.other.lease(MIB) and self.member.pin(8192)
        self.file = os.open(self.ledger.path, os.O_RDWR)
        self.good = os.pread(self.file, HEADER + 64 * ROW, 0)

    def write(self, offset: int, word: int) -> None:
        os.pwrite(self.file, struct.pack("<q", word), offset)

    def restore(self) -> None:
        os.pwrite(self.file, self.good, 0)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "ledger")
    yield bench
    bench.restore()
    bench.ledger.close()
    os.close(bench.file)


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf, -1.0, 0.0, 1e300])
def test_a_weight_that_makes_no_sense_is_the_usual_one(bench: Bench, weight: float) -> None:
    """It stopped every neighbour's scheduler."""
    expected = bench.other.target(4096, MIB)
    bench.write(WEIGHT, as_word(weight))
    assert bench.other.target(4096, MIB) == expected
    assert bench.ledger.snapshot().accounts[0].weight == 1.0


def test_no_program_of_words_ends_in_another_exception(bench: Bench) -> None:
    operations = {
        "snapshot": bench.ledger.snapshot,
        "target": lambda: bench.account.target(4096),
        "target with demand": lambda: bench.other.target(4096, MIB),
        "lease": lambda: bench.other.lease(4096),
        "reap": bench.ledger.reap,
        "pin": lambda: bench.member.pin(4096),
        "limit": lambda: bench.ledger.set_limit("one", 1 << 20),
    }
    for seed in range(1500):
        dice = random.Random(seed)
        bench.restore()
        for _ in range(dice.randint(1, 8)):
            offset = 8 * dice.randrange((HEADER + 3 * ROW) // 8)
            if offset != LOCK:  # a live process with the lock is waited for: tested elsewhere
                word = dice.choice(WORDS) if dice.random() < 0.8 else dice.getrandbits(63)
                bench.write(offset, word)
        for name, operation in operations.items():
            try:
                operation()
            except KvcachedError:
                continue
            except (ValueError, ArithmeticError, LookupError, TypeError) as error:
                raise AssertionError(f"seed {seed}: {name}") from error
        assert 0 <= bench.other.leasable() <= MOST
        assert bench.other.charge() >= 0 and 0 <= bench.account.ceiling() <= MOST


def test_commands_say_what_is_there(
    bench: Bench, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVCACHED_DIR", str(bench.ledger.path.parent))
    for seed in range(25):
        dice = random.Random(seed)
        bench.restore()
        for _ in range(6):
            offset = HEADER + 8 * dice.randrange(2 * ROW // 8)
            bench.write(offset, dice.choice(WORDS))
        ran = run("list", "--json")
        if ran.code == 0:
            json.loads(ran.out, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
        else:
            assert ran.err.count("\n") <= 2, ran.err


def test_sizes_that_no_device_has_are_refused(bench: Bench, tmp_path: Path) -> None:
    for size in (MOST + 1, 1 << 62, (1 << 63) - 1):
        with pytest.raises(InvalidArgumentError, match="capacity"):
            Ledger.open(tmp_path / "other", DEVICE, size)
        with pytest.raises(InvalidArgumentError, match="capacity"):
            bench.ledger.set_capacity(size)
        with pytest.raises(InvalidArgumentError, match="add up"):
            bench.ledger.set_guarantee("one", size)
        assert not bench.account.lease(size)
        assert not bench.member.set_aside(size)
        assert bench.member.set_aside(0)
    Ledger.open(tmp_path / "other", DEVICE, MOST).close()
