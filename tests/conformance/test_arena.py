"""What an arena does on every backend, as long as the driver says yes."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from devices import Device, HostDevice

from kvcached.errors import InvalidArgumentError
from kvcached.vmm_ops import Arena

PAGES = 8


def open_arena(device: Device, regions: int = 1, pages: int = PAGES, pool_bytes: int = 0) -> Arena:
    """Regions end to end, the second of twice the page size."""
    chunks = [device.chunk * (2 if index == 1 else 1) for index in range(regions)]
    places, offset = [], 0
    for chunk in chunks:
        places.append((offset, chunk))
        offset += pages * chunk
    return Arena(device.backend, places, pages, offset, pool_bytes)


def assert_books_agree(device: Device, arena: Arena) -> None:
    """The arena's sums, the probe's and the kernel's are the same."""
    arena.check()
    expected = arena.mapped_bytes() + arena.pooled_bytes() + arena.quarantined_bytes()
    assert arena.created_bytes() == expected
    assert device.backend.created_bytes() == arena.created_bytes()
    assert device.physical_bytes() == arena.created_bytes()
    assert arena.mapped_bytes() == len(arena.mapped_pages()) * arena.page_bytes
    placed = device.placed_bytes(arena.address, arena.size)
    if placed is not None and arena.quarantined_bytes() == 0:
        assert placed == arena.mapped_bytes()


@pytest.mark.parametrize("regions", [1, 3])
def test_map_and_unmap_change_exactly_what_they_say(device: Device, regions: int) -> None:
    arena = open_arena(device, regions)
    assert arena.created_bytes() == 0
    assert arena.map([5, 2, 3]) == 3 * arena.page_bytes
    assert arena.mapped_pages() == [2, 3, 5]
    assert [arena.is_mapped(page) for page in range(PAGES)] == [
        page in (2, 3, 5) for page in range(PAGES)
    ]
    assert_books_agree(device, arena)
    assert arena.unmap([3, 5]) == 2 * arena.page_bytes
    assert arena.mapped_pages() == [2]
    assert_books_agree(device, arena)
    assert arena.map([]) == 0
    assert arena.unmap([]) == 0
    assert arena.unmap([2]) == arena.page_bytes
    assert arena.counters() == {
        "maps": 3 * regions,
        "unmaps": 3 * regions,
        "creates": 3 * regions,
        "releases": 3 * regions,
        "failures": 0,
    }
    assert arena.last_failure() == ""
    assert_books_agree(device, arena)


def test_pages_lie_where_the_regions_say(device: Device) -> None:
    arena = open_arena(device, regions=3)
    chunk = device.chunk
    offsets = [(0, chunk), (PAGES * chunk, 2 * chunk), (3 * PAGES * chunk, chunk)]
    arena.map([1, 4])
    for page in (1, 4):
        for index, (offset, size) in enumerate(offsets):
            device.write(arena.address + offset + page * size, 10 * page + index, size)
    for page in (1, 4):
        for index, (offset, size) in enumerate(offsets):
            found = device.read(arena.address + offset + page * size, size)
            assert found == bytes([10 * page + index]) * size


def test_new_memory_reads_as_zeros_also_the_second_time(device: Device) -> None:
    arena = open_arena(device)
    for _ in range(3):
        arena.map([0, 1])
        assert device.read(arena.address, 2 * device.chunk) == bytes(2 * device.chunk)
        device.write(arena.address, 0xA5, 2 * device.chunk)
        arena.unmap([0, 1])


def test_contents_stay_while_others_come_and_go(device: Device) -> None:
    arena, neighbour = open_arena(device), open_arena(device)
    arena.map([3])
    device.write(arena.address + 3 * device.chunk, 0x5A, device.chunk)
    for _ in range(3):
        arena.map([2, 4, 7])
        neighbour.map([3])
        device.write(arena.address + 2 * device.chunk, 1, device.chunk)
        device.write(arena.address + 4 * device.chunk, 2, device.chunk)
        device.write(neighbour.address + 3 * device.chunk, 3, device.chunk)
        arena.unmap([2, 4, 7])
        neighbour.unmap([3])
    found = device.read(arena.address + 3 * device.chunk, device.chunk)
    assert found == b"\x5a" * device.chunk


def test_pool_keeps_up_to_its_limit(device: Device) -> None:
    arena = open_arena(device, pool_bytes=3 * device.chunk)
    arena.map([0, 1, 2, 3, 4])
    assert arena.unmap([0, 1, 2, 3, 4]) == 2 * device.chunk
    assert arena.pooled_bytes() == arena.created_bytes() == 3 * device.chunk
    assert_books_agree(device, arena)
    assert arena.map([5, 6, 7, 0]) == device.chunk
    assert arena.counters()["creates"] == 6
    arena.unmap([5, 6, 7])
    assert arena.trim(device.chunk) == 2 * device.chunk
    assert arena.trim() == device.chunk
    assert arena.trim() == 0
    assert_books_agree(device, arena)


def test_pool_serves_every_region(device: Device) -> None:
    arena = open_arena(device, regions=3, pool_bytes=1 << 30)
    arena.map([0, 1])
    arena.unmap([0, 1])
    assert arena.map([6, 7]) == 0
    assert arena.pooled_bytes() == 0
    assert_books_agree(device, arena)


def test_wrong_pages_are_named_and_change_nothing(device: Device) -> None:
    arena = open_arena(device)
    arena.map([1])
    for page in (-1, PAGES, 1 << 40):
        for call in (arena.map, arena.unmap):
            with pytest.raises(
                InvalidArgumentError, match=f"page {page} is outside 0..{PAGES - 1}"
            ):
                call([0 if call == arena.map else 1, page])
        with pytest.raises(InvalidArgumentError, match=f"page {page} is outside"):
            arena.is_mapped(page)
    with pytest.raises(InvalidArgumentError, match="page 1 is mapped already"):
        arena.map([0, 1])
    with pytest.raises(InvalidArgumentError, match="page 2 is not mapped"):
        arena.unmap([1, 2])
    with pytest.raises(InvalidArgumentError, match="page 3 is named twice"):
        arena.map([3, 0, 3])
    with pytest.raises(InvalidArgumentError, match="page 1 is named twice"):
        arena.unmap([1, 1])
    assert arena.mapped_pages() == [1]
    assert arena.counters()["failures"] == 0
    assert_books_agree(device, arena)


def test_arenas_that_do_not_fit_are_refused(device: Device) -> None:
    chunk, backend = device.chunk, device.backend
    for regions, pages, size, message in (
        ([(0, chunk)], 0, chunk, "at least one page"),
        ([(0, chunk)], 1, chunk + 1, "at least one page"),
        ([(0, chunk)], 1, 0, "at least one page"),
        ([], 1, chunk, "at least one region"),
        ([(0, chunk - 1)], 1, chunk, "multiples of the granularity"),
        ([(0, 0)], 1, chunk, "multiples of the granularity"),
        ([(1, chunk)], 1, 2 * chunk, "multiples of the granularity"),
        ([(0, chunk)], 2, chunk, "do not fit"),
        ([(2 * chunk, chunk)], 1, chunk, "do not fit"),
        ([(0, chunk)], 1 << 60, chunk, "do not fit"),
        ([(0, chunk), (chunk, chunk)], 2, 4 * chunk, "overlaps the one before it"),
        ([(2 * chunk, chunk), (0, 2 * chunk)], 2, 8 * chunk, "overlaps the one before it"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            Arena(backend, regions, pages, size)
    assert backend.live_reservations() == 0


def test_nothing_is_left_when_an_arena_dies(device: Device) -> None:
    arena = open_arena(device, regions=2, pool_bytes=4 * device.chunk)
    address, size = arena.address, arena.size
    arena.map([0, 3, 4, 6])
    arena.unmap([3])
    del arena
    assert device.backend.live_handles() == 0
    assert device.backend.live_reservations() == 0
    assert device.physical_bytes() == 0
    assert device.placed_bytes(address, size) in (0, None)


def test_device_tells_its_memory(device: Device) -> None:
    assert 0 < device.backend.free_bytes() <= device.backend.total_bytes()
    assert device.backend.granularity & (device.backend.granularity - 1) == 0


def test_mappings_stay_bounded(device: Device) -> None:
    """At the worst every page has a hole beside it; a full arena needs few mappings."""
    if not isinstance(device, HostDevice):
        pytest.skip("the driver does not list its mappings")
    arena = open_arena(device, pages=64)
    arena.map(list(range(0, 64, 2)))
    assert device.mappings(arena.address, arena.size) <= 64
    arena.unmap(list(range(0, 64, 2)))
    assert device.mappings(arena.address, arena.size) == 1
    arena.map(list(range(64)))
    assert device.mappings(arena.address, arena.size) <= 2


def hammer(device: Device, arena: Arena, mine: list[int], seed: int) -> None:
    """Maps, fills, checks and unmaps pages that no other thread uses."""
    rng = random.Random(seed)
    for turn in range(60):
        pages = rng.sample(mine, rng.randint(1, len(mine)))
        arena.map(pages)
        for page in pages:
            place = arena.address + page * device.chunk
            assert device.read(place, 16) in (bytes(16), bytes([seed]) * 16)
            device.write(place, seed, device.chunk)
        for page in pages:
            place = arena.address + page * device.chunk
            assert device.read(place, device.chunk) == bytes([seed]) * device.chunk
        arena.unmap(pages)
        if turn % 10 == 0:
            arena.check()
            arena.trim(device.chunk)


def test_threads_do_not_disturb_each_other(device: Device) -> None:
    arena = open_arena(device, pages=32)
    with ThreadPoolExecutor(max_workers=4) as threads:
        runs = [
            threads.submit(hammer, device, arena, list(range(first, first + 8)), first + 1)
            for first in range(0, 32, 8)
        ]
        for run in runs:
            run.result()
    assert arena.mapped_pages() == []
    assert_books_agree(device, arena)
