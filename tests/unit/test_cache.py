"""Whole instances in one process, on real host memory: shortage, relief, and refusals."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcached.cache import ElasticCache, PageMapper
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

    def cache(
        self,
        name: str,
        map_timeout_s: float = 0.0,
        warm: tuple[int, int] = (1, 4),
        zero_holes: bool = False,
    ) -> ElasticCache:
        return ElasticCache(
            self.ledger,
            self.backend,
            self.layout,
            instance=name,
            name=name,
            warm_low=warm[0],
            warm_high=warm[1],
            map_timeout_s=map_timeout_s,
            zero_holes=zero_holes,
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
        """Once nothing is on its way, ledger, arena, backend and kernel say the same."""
        for cache in caches:
            core = cache.mapper.core
            assert cache.mapper.drain(10) or core.counters()["fence_failures"]
            core.check()
            # Pages that were refused ahead of need are under a lease, and not there.
            blocks, arena = cache.pool.blocks, cache.mapper.arena
            present = [page for page in range(PAGES) if blocks.is_present(page)]
            leased = arena.created_bytes() + core.missing(present) * self.page
            held = cache.member.held()
            assert cache.account.charge() == held
            # What a refusal left in quarantine may take the place of the page that was refused.
            assert leased - arena.quarantined_bytes() <= held <= leased
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
    device.check(cache)
    assert device.physical_bytes() == 2 * device.page  # pinned and one warm
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
    device.check(one, two)
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
    assert cache.mapper.arena.mapped_pages() == [0]
    refunded = cache.pool.blocks.present_pages * device.page - cache.account.charge()
    assert refunded == 2 * device.page
    cache.close()
    device.check(other)
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
            cache.mapper.drain(10)
            cache.mapper.core.check()
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
    cache = device.cache("one", warm=(0, 0))
    ids = cache.alloc(3 + 4 * PER_PAGE)
    assert ids is not None
    device.backend.inject(1, "driver", "release", times=FOR_GOOD)
    cache.free(ids)
    assert cache.mapper.drain(10)
    device.backend.inject_off()
    assert cache.mapper.arena.quarantined_bytes() == 4 * device.page
    device.check(cache)
    assert cache.account.charge() == 5 * device.page
    assert cache.alloc(3 + 2 * PER_PAGE) is not None  # mapping tries again, and gives them back
    assert cache.mapper.arena.quarantined_bytes() == 0
    device.check(cache)
    assert cache.account.charge() == 3 * device.page
    cache.close()


def test_pages_are_held_before_there_is_a_scheduler(device: Device) -> None:
    """As for an engine's warm-up: charged without a lease, and gone when it ends."""
    member = device.ledger.attach("one", "one", device.page)
    mapper = PageMapper(device.ledger, member, device.backend, device.layout, map_timeout_s=0)
    mapper.hold([2, 5, 2])
    mapper.hold([5, 0, 3])
    assert mapper.arena.mapped_pages() == [0, 2, 3, 5]
    assert member.held() == 4 * device.page == device.ledger.snapshot().charge
    mapper.drop_held()
    assert mapper.arena.mapped_pages() == [0]
    account = device.ledger.join("one", "one", device.page)
    assert account.charge() == member.held() == device.page
    mapper.close()


def test_a_refusal_is_told_before_the_device_is_asked_again(device: Device) -> None:
    """Whoever measures what others use may look anew."""
    told: list[int] = []
    member = device.ledger.attach("one", "one", device.page)

    def refused() -> None:
        told.append(member.held())
        device.backend.inject_off()

    mapper = PageMapper(
        device.ledger,
        member,
        device.backend,
        device.layout,
        map_timeout_s=5,
        on_refusal=refused,
    )
    device.backend.inject(1, "out_of_memory", "create", FOR_GOOD)
    mapper.hold([1])
    assert told == [2 * device.page]
    assert mapper.arena.mapped_pages() == [0, 1]
    mapper.close()


def test_zeros_under_holes_are_charged_and_go_back_at_the_end(tmp_path: Path) -> None:
    device = Device(tmp_path, capacity_pages=4)
    cache = device.cache("one", warm=(0, 0), zero_holes=True)
    assert cache.account.charge() == 2 * device.page, "the pinned page and the zeros"
    held = cache.alloc(2 * PER_PAGE)
    assert held is not None
    assert cache.alloc(PER_PAGE) is None, "the zeros count"
    device.check(cache)
    cache.free(held)
    device.check(cache)
    cache.close()
    assert device.physical_bytes() == 0
    assert device.ledger.snapshot().charge == 0
