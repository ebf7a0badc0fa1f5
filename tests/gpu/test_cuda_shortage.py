"""When a GPU's memory is short: processes that race for the last of it, and a foreign program."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kvcached import vmm_ops
from kvcached.cache import ElasticCache
from kvcached.errors import OutOfMemoryError, UnavailableError
from kvcached.layout import BlockLayout
from kvcached.ledger import Ledger
from kvcached.units import MIB

pytestmark = pytest.mark.gpu
DEVICE = "host:shortage"  # a ledger of its own: what else the GPU holds is not its affair
BLOCK_BYTES, PER_PAGE = 2 * MIB, 16
PAGE_BYTES = BLOCK_BYTES * PER_PAGE
PAGES = 16

RACER = f"""
import json, random, sys
from pathlib import Path
from kvcached import vmm_ops
from kvcached.cache import ElasticCache
from kvcached.layout import BlockLayout
from kvcached.ledger import Ledger

folder, name = sys.argv[1:]
ledger = Ledger.open(Path(folder), {DEVICE!r}, create=False)
layout = BlockLayout.block_outermost({PAGES * PER_PAGE}, {BLOCK_BYTES}, {PER_PAGE}, 2 << 20)
cache = ElasticCache(ledger, vmm_ops.cuda_backend(0), layout, instance=name, name=name)
draw = random.Random(name)
rounds = refusals = most = 0
print("ready", flush=True)
sys.stdin.readline()
while rounds < 100:
    held = []
    while (ids := cache.alloc(draw.randrange(1, 40))) is not None:
        held += ids
    refusals += 1
    most = max(most, len(held))
    if held:
        cache.free(held, cached=draw.random() < 0.5)
        rounds += 1
    cache.relieve()
cache.close()
print(json.dumps(dict(refusals=refusals, most=most)), flush=True)
"""


def test_two_processes_race_for_the_last_memory(tmp_path: Path) -> None:
    """A hundred times each takes all that it can get: neither dies, neither starves."""
    _backend()
    capacity = PAGES * PAGE_BYTES
    with Ledger.open(tmp_path / "ledger", DEVICE, capacity) as ledger:
        racers = [
            subprocess.Popen(
                [sys.executable, "-c", RACER, str(ledger.path.parent), name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for name in ("a", "b")
        ]
        for racer in racers:
            assert racer.stdout is not None and racer.stdout.readline() == "ready\n"
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("go\n")
            racer.stdin.flush()
        answers = [json.loads(racer.communicate(timeout=240)[0]) for racer in racers]
        assert [racer.returncode for racer in racers] == [0, 0]
        ledger.reap()
        seen = ledger.snapshot()
        assert seen.high_water <= capacity and seen.charge == 0
    for answer in answers:
        assert answer["refusals"] >= 100 and answer["most"] > PER_PAGE


def _backend() -> vmm_ops.Backend:
    try:
        return vmm_ops.cuda_backend(0)
    except UnavailableError as error:
        pytest.skip(str(error))


class Hog:
    """A foreign program: it takes all of the GPU but so many bytes."""

    SIZE = 256 * MIB

    def __init__(self, backend: vmm_ops.Backend, leave_bytes: int) -> None:
        pages = backend.total_bytes() // self.SIZE
        self.arena = vmm_ops.Arena(backend, [(0, self.SIZE)], pages, pages * self.SIZE)
        self.arena.map(list(range((backend.free_bytes() - leave_bytes) // self.SIZE)))

    def give_back(self) -> None:
        self.arena.unmap(self.arena.mapped_pages())


def _cache(ledger: Ledger, backend: vmm_ops.Backend, map_timeout_s: float) -> ElasticCache:
    layout = BlockLayout.block_outermost(64 * PER_PAGE, BLOCK_BYTES, PER_PAGE, backend.granularity)
    return ElasticCache(
        ledger, backend, layout, instance="i", name="ours", map_timeout_s=map_timeout_s
    )


def test_memory_that_a_foreign_program_took_is_waited_for(tmp_path: Path) -> None:
    backend = _backend()
    with Ledger.open(tmp_path / "ledger", DEVICE, 64 * PAGE_BYTES) as ledger:
        cache = _cache(ledger, backend, map_timeout_s=60.0)
        hog = Hog(backend, leave_bytes=Hog.SIZE)
        got: list[int] = []
        asking = threading.Thread(target=lambda: got.extend(cache.alloc(40 * PER_PAGE) or []))
        asking.start()
        deadline = time.monotonic() + 20
        while not (demand := ledger.snapshot().accounts[0].demand):
            assert time.monotonic() < deadline, "the pressure was not raised"
            time.sleep(0.01)
        assert asking.is_alive() and not got and demand > 0
        hog.give_back()
        asking.join(30)
        assert len(set(got)) == 40 * PER_PAGE
        assert ledger.snapshot().accounts[0].demand == 0
        cache.mapper.arena.check()
        cache.free(got)
        cache.close()
        assert ledger.snapshot().charge == 0
    assert backend.created_bytes() == 0


def test_a_refusal_that_lasts_fails_the_step_and_nothing_leaks(tmp_path: Path) -> None:
    backend = _backend()
    with Ledger.open(tmp_path / "ledger", DEVICE, 64 * PAGE_BYTES) as ledger:
        cache = _cache(ledger, backend, map_timeout_s=0.5)
        hog = Hog(backend, leave_bytes=Hog.SIZE)
        with pytest.raises(OutOfMemoryError, match=r"under a lease for 0\.5 s.*ours"):
            cache.alloc(40 * PER_PAGE)
        cache.mapper.arena.check()
        cache.close()
        hog.give_back()
        assert ledger.snapshot().charge == 0
    assert backend.created_bytes() == 0
