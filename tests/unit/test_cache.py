"""Whole instances in one process, on real host memory: shortage, relief, and refusals."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcached.cache import ElasticCache
from kvcached.errors import DriverError, InvalidArgumentError, OutOfMemoryError
from kvcached.layout import BlockLayout
from kvcached.ledger import Ledger
from kvcached.vmm_ops import Backend, host_backend

PER_PAGE = 4
PAGES = 16
FOR_GOOD = 1_000_000


class Device:
    """A ledger and a backend that hold ``capacity_pages``."""

    def __init__(self, folder: Path, capacity_pages: int = 10) -> None:
        self.name = f"cache-{os.getpid()}-{folder.name}"
        self.backend: Backend = host_backend(self.name)
        block = self.backend.granularity
        self.layout = BlockLayout.block_outermost(PAGES * PER_PAGE, block, PER_PAGE, block)
        self.page = self.layout.page_bytes
        self.ledger = Ledger.open(folder / "ledger", "host:cache", capacity_pages * self.page)

    def cache(self, name: str, map_timeout_s: float = 0.0) -> ElasticCache:
        return ElasticCache(
            self.ledger,
            self.backend,
            self.layout,
            instance=name,
            name=name,
            map_timeout_s=map_timeout_s,
        )

    def physical_bytes(self) -> int:
        """What the kernel has allocated."""
        wanted = f"/memfd:kvcached:{self.name} (deleted)"
        return sum(
            entry.stat().st_blocks * 512
            for entry in Path("/proc/self/fd").iterdir()
            if _target(entry) == wanted
        )

    def check(self, *caches: ElasticCache) -> None:
        """Ledger, arena, backend and kernel say the same."""
        for cache in caches:
            cache.mapper.arena.check()
            created = cache.mapper.arena.created_bytes()
            assert cache.member.held() == created
            assert cache.account.charge() == created
        created = sum(cache.mapper.arena.created_bytes() for cache in caches)
        assert self.backend.created_bytes() == created == self.physical_bytes()


def _target(entry: Path) -> str:
    try:
        return os.readlink(entry)
    except OSError:
        return ""  # the descriptor of the listing itself


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    device = Device(tmp_path)
    yield device
    device.ledger.close()


def test_alloc_maps_free_unmaps_and_none_is_a_shortage(device: Device) -> None:
    cache = device.cache("one")
    device.check(cache)
    ids = cache.alloc(3 + 9 * PER_PAGE)
    assert ids is not None and 0 not in ids
    device.check(cache)
    assert device.physical_bytes() == 10 * device.page
    assert cache.alloc(1) is None
    device.check(cache)
    cache.free(ids)
    assert device.physical_bytes() == 2 * device.page  # pinned and one warm
    device.check(cache)
    cache.close()
    assert device.physical_bytes() == 0
    assert not device.ledger.snapshot().accounts


@pytest.mark.parametrize("count", [0, -1, PAGES * PER_PAGE + 1])
def test_a_bad_count_is_an_error_and_no_demand(device: Device, count: int) -> None:
    cache = device.cache("one")
    with pytest.raises(InvalidArgumentError, match=str(count)):
        cache.alloc(count)
    assert cache.pool.counters.refused == 0
    device.check(cache)
    cache.close()


def test_two_instances_relieve_each_other(device: Device) -> None:
    one, two = device.cache("one"), device.cache("two")
    first = one.alloc(3 + 8 * PER_PAGE)
    assert first is not None
    one.free(first, cached=True)
    assert device.physical_bytes() == 10 * device.page
    assert two.alloc(3 + 4 * PER_PAGE) is None
    assert one.relieve() == 4 * device.page
    device.check(one, two)
    second = two.alloc(3 + 4 * PER_PAGE)
    assert second is not None
    assert one.account.others_demand() == 0
    device.check(one, two)
    assert one.alloc(3 + 4 * PER_PAGE) is not None, "its other cached blocks are still its own"
    assert one.alloc(1) is None
    two.free(second)
    assert one.alloc(1) is not None
    device.check(one, two)
    one.close()
    two.close()
    assert device.physical_bytes() == 0


def test_a_device_without_memory_is_asked_again(device: Device) -> None:
    cache = device.cache("one", map_timeout_s=5.0)
    device.backend.inject(1, "out_of_memory", "create", times=3)
    ids = cache.alloc(3 + PER_PAGE)
    assert ids is not None
    device.check(cache)
    cache.close()


def test_a_device_that_goes_on_refusing_is_named(device: Device) -> None:
    other, cache = device.cache("other"), device.cache("one", map_timeout_s=0.05)
    device.backend.inject(1, "out_of_memory", "create", times=FOR_GOOD)
    with pytest.raises(OutOfMemoryError) as error:
        cache.alloc(3 + 2 * PER_PAGE)
    device.backend.inject_off()
    message = str(error.value)
    for part in ("host:cache", "32 KiB", "other 16 KiB", "one ", "0.05 s", "Another program"):
        assert part in message, message
    device.check(other, cache)
    cache.close()
    assert other.alloc(3 + 8 * PER_PAGE) is not None, "all else can be leased again"
    other.close()
    assert device.physical_bytes() == 0


def test_an_instance_that_cannot_pin_leaves_nothing(device: Device) -> None:
    for code, kind in (("out_of_memory", OutOfMemoryError), ("driver", DriverError)):
        for nth in itertools.count(1):
            calls = device.backend.calls()
            device.backend.inject(nth, code)  # type: ignore[arg-type]
            try:
                cache = device.cache("one")
            except kind:
                cache = None
            device.backend.inject_off()
            if cache is not None:
                device.check(cache)
                cache.close()
            assert not device.ledger.snapshot().accounts
            if cache is not None and device.backend.calls() - calls < nth:
                break
        assert nth > 1


STEPS = (
    lambda cache, held: held.append(cache.alloc(3 + 4 * PER_PAGE)),
    lambda cache, held: cache.free(held[0][: 2 * PER_PAGE], cached=True),
    lambda cache, held: cache.free(held[0][2 * PER_PAGE :]),
    lambda cache, held: held.append(cache.alloc(3 + 6 * PER_PAGE)),
)


@pytest.mark.parametrize("times", [1, 3, FOR_GOOD], ids=["once", "thrice", "for-good"])
@pytest.mark.parametrize("code", ["out_of_memory", "driver"])
@pytest.mark.parametrize("operation", [None, "create", "map", "access", "unmap", "release"])
def test_every_driver_call_may_fail(
    device: Device, code: str, operation: str | None, times: int
) -> None:
    """Books, arena and kernel agree after each step, whatever was refused; nothing is left."""
    timeout_s = 5.0 if times < FOR_GOOD else 0.0
    for nth in itertools.count(1):
        cache = device.cache("one", map_timeout_s=timeout_s)
        calls = device.backend.calls()
        device.backend.inject(nth, code, operation, times)  # type: ignore[arg-type]
        held: list[list[int]] = []
        try:
            for step in STEPS:
                step(cache, held)
                device.check(cache)
        except (OutOfMemoryError, DriverError):
            assert code == "driver" or times == FOR_GOOD
            assert cache.member.held() == cache.mapper.arena.created_bytes()
        device.backend.inject_off()
        reached = device.backend.calls() - calls >= nth
        cache.close()
        del cache
        assert device.physical_bytes() == device.backend.created_bytes() == 0
        assert not device.ledger.snapshot().accounts
        if not reached or nth > 60:
            break
    assert nth > 1


def test_memory_in_quarantine_stays_charged_until_it_goes(device: Device) -> None:
    cache = device.cache("one")
    ids = cache.alloc(3 + 4 * PER_PAGE)
    assert ids is not None
    device.backend.inject(1, "driver", "release", times=FOR_GOOD)
    cache.free(ids)
    device.backend.inject_off()
    assert cache.mapper.arena.quarantined_bytes() == 3 * device.page
    device.check(cache)
    assert cache.account.charge() == 5 * device.page
    assert cache.alloc(3 + 2 * PER_PAGE) is not None  # mapping tries again, and gives them back
    assert cache.mapper.arena.quarantined_bytes() == 0
    device.check(cache)
    assert cache.account.charge() == 3 * device.page
    cache.close()
