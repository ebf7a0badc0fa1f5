"""Holes that are backed by shared zeros: what reads and writes there do, and every refusal."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from devices import Device
from test_arena import PAGES
from test_faults import FOR_GOOD, assert_nothing_left, failing

from kvcached.errors import DriverError, OutOfMemoryError
from kvcached.ledger import Ledger
from kvcached.vmm_ops import Arena, Mapper


def open_covered(device: Device, regions: int = 1, pool_bytes: int = 0) -> Arena:
    """Regions end to end, the second of twice the page size."""
    places, offset = [], 0
    for index in range(regions):
        chunk = device.chunk * (2 if index == 1 else 1)
        places.append((offset, chunk))
        offset += PAGES * chunk
    return Arena(device.backend, places, PAGES, offset, pool_bytes, zero_holes=True)


def zeros(device: Device, regions: int) -> int:
    return device.chunk * (3 if regions > 1 else 1)


def assert_covered(device: Device, arena: Arena) -> None:
    """The books are exact, and every address can be read."""
    arena.check()
    parts = (arena.mapped_bytes(), arena.pooled_bytes(), arena.quarantined_bytes())
    assert arena.created_bytes() == sum(parts) + arena.zero_bytes()
    assert device.backend.created_bytes() == device.physical_bytes() == arena.created_bytes()
    assert arena.bare_places() == 0
    assert len(device.read(arena.address, arena.size)) == arena.size
    placed = device.placed_bytes(arena.address, arena.size)
    assert placed in (arena.size, None)


@pytest.mark.parametrize("regions", [1, 3])
def test_holes_read_as_zeros_before_between_and_after(device: Device, regions: int) -> None:
    arena = open_covered(device, regions)
    assert arena.zero_bytes() == arena.created_bytes() == zeros(device, regions)
    for _ in range(2):
        assert device.read(arena.address, arena.size) == bytes(arena.size)
        assert arena.map([1, 4]) == 2 * arena.page_bytes
        place = arena.address + 4 * device.chunk
        device.write(place, 0x5A, device.chunk)
        expected = bytearray(arena.size)
        expected[4 * device.chunk : 5 * device.chunk] = b"\x5a" * device.chunk
        assert device.read(arena.address, arena.size) == expected
        assert_covered(device, arena)
        assert arena.unmap([1, 4]) == 2 * arena.page_bytes
    assert_covered(device, arena)
    assert arena.counters()["failures"] == 0
    del arena
    assert_nothing_left(device)


def test_what_is_written_to_a_hole_shows_at_all_holes_and_in_no_page(device: Device) -> None:
    """It is the one memory: why this is not the default."""
    arena = open_covered(device)
    arena.map([0])
    device.write(arena.address + 3 * device.chunk, 0x11, 16)
    assert device.read(arena.address + 6 * device.chunk, 16) == b"\x11" * 16
    assert device.read(arena.address, device.chunk) == bytes(device.chunk)
    arena.map([6])
    assert device.read(arena.address + 6 * device.chunk, device.chunk) == bytes(device.chunk)


@pytest.mark.parametrize("times", [1, 2, FOR_GOOD])
@pytest.mark.parametrize("regions", [1, 3])
def test_every_call_of_opening_may_fail(device: Device, regions: int, times: int) -> None:
    for nth in itertools.count(1):
        for code, error in (("out_of_memory", OutOfMemoryError), ("driver", DriverError)):
            calls = device.backend.calls()
            try:
                with failing(device, nth, code=code, times=times):
                    arena = open_covered(device, regions)
                    reached = device.backend.calls() - calls >= nth
            except error:
                reached = True
            else:
                assert not reached
                del arena
            if times == 1:
                assert_nothing_left(device)
        if not reached or times > 1:
            break
    assert nth > 1 or times > 1


@pytest.mark.parametrize("times", [1, FOR_GOOD], ids=["once", "for-good"])
@pytest.mark.parametrize("operation", ["map", "unmap"])
@pytest.mark.parametrize("regions", [1, 3])
def test_every_call_of_map_and_unmap_may_fail(
    device: Device, regions: int, operation: str, times: int
) -> None:
    for nth in itertools.count(1):
        arena = open_covered(device, regions)
        arena.map([0, 1, 2])
        device.write(arena.address, 0x77, device.chunk)
        before, calls = arena.created_bytes(), device.backend.calls()
        with failing(device, nth, code="driver", times=times):
            try:
                change = arena.map([3, 6]) if operation == "map" else -arena.unmap([1, 2])
            except DriverError:
                assert operation == "map" and arena.mapped_pages() == [0, 1, 2]
            else:
                assert arena.created_bytes() - before == change
            reached = device.backend.calls() - calls >= nth
        arena.check()
        assert device.backend.created_bytes() == arena.created_bytes()
        arena.retry_quarantine()
        assert arena.quarantined_bytes() == 0
        assert_covered(device, arena)
        assert device.read(arena.address, device.chunk) == b"\x77" * device.chunk
        arena.map([page for page in range(PAGES) if not arena.is_mapped(page)])
        arena.unmap(list(range(PAGES)))
        assert device.read(arena.address, arena.size) == bytes(arena.size)
        del arena
        assert_nothing_left(device)
        if not reached:
            break
    assert nth > 4


def test_a_hole_that_could_not_be_covered_is_bare_until_the_driver_gives_in(
    device: Device,
) -> None:
    arena = open_covered(device)
    arena.map([2, 3])
    for operation in ("map", "access"):
        with failing(device, 1, code="driver", operation=operation, times=FOR_GOOD):
            assert arena.unmap([2]) == arena.page_bytes
            assert arena.bare_places() == 1
            assert "injected" in arena.last_failure()
        arena.map([2])  # a bare place takes a page like any other
        assert arena.bare_places() == 0
    with failing(device, 1, code="driver", operation="map"):
        arena.unmap([2])
    assert arena.bare_places() == 1
    arena.trim()
    assert_covered(device, arena)


@pytest.mark.parametrize("regions", [1, 3])
def test_every_call_of_the_destructor_may_fail_once(device: Device, regions: int) -> None:
    for nth in itertools.count(1):
        arena = open_covered(device, regions, pool_bytes=4 * device.chunk)
        arena.map([0, 3, 4])
        arena.unmap([3])
        calls = device.backend.calls()
        with failing(device, nth, code="driver"):
            del arena
        assert_nothing_left(device)
        if device.backend.calls() - calls < nth:
            break
    assert nth > PAGES * regions


def test_a_destructor_that_fails_for_good_keeps_the_books(device: Device) -> None:
    arena = open_covered(device, 2)
    arena.map([0])
    with failing(device, 1, code="driver", times=FOR_GOOD):
        del arena
    assert device.backend.live_reservations() == 1
    assert device.physical_bytes() == device.backend.created_bytes() > 0


def test_zeros_can_be_given_back_before_the_arena_dies(device: Device) -> None:
    arena = open_covered(device, 3)
    arena.map([1])
    with (
        failing(device, 3, code="driver", operation="unmap", times=2),
        pytest.raises(DriverError, match="keeps zeros mapped"),
    ):
        arena.uncover()
    assert arena.zero_bytes() == zeros(device, 3)
    assert arena.uncover() == zeros(device, 3)
    assert arena.uncover() == arena.zero_bytes() == 0
    assert arena.created_bytes() == arena.mapped_bytes() == device.physical_bytes()
    arena.unmap([1])
    arena.map([0, 1])
    arena.check()
    del arena
    assert_nothing_left(device)


@pytest.mark.parametrize("seed", range(3))
def test_random_operations_under_random_faults(device: Device, seed: int) -> None:
    rng = random.Random(seed)
    arena = open_covered(device, 1 + seed, pool_bytes=seed * device.chunk)
    contents: dict[int, int] = {}
    for _ in range(80):
        pages = rng.sample(range(PAGES), rng.randint(1, 4))
        absent = [page for page in pages if page not in contents]
        present = [page for page in pages if page in contents]
        times, code = rng.choice([1, 3, FOR_GOOD]), rng.choice(["out_of_memory", "driver"])
        with failing(device, rng.randint(1, 20), code=code, times=times):
            try:
                arena.map(absent)
            except (OutOfMemoryError, DriverError):
                absent = []
            arena.unmap(present)
        arena.trim()
        for page in present:
            del contents[page]
        for page in absent:
            contents[page] = rng.randrange(1, 256)
            device.write(arena.address + page * device.chunk, contents[page], device.chunk)
        assert arena.mapped_pages() == sorted(contents)
        assert_covered(device, arena)
        for page in range(PAGES):
            found = device.read(arena.address + page * device.chunk, device.chunk)
            assert found == bytes([contents.get(page, 0)]) * device.chunk
    del arena
    assert_nothing_left(device)


def test_the_mapping_thread_keeps_zeros_booked(device: Device, tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "ledger", "host:zero", 64 * device.chunk) as ledger:
        member = ledger.attach("one", "one", 2 * device.chunk)
        account = ledger.join("one", "one", 2 * device.chunk)
        assert member.pin(device.chunk)
        arena = open_covered(device, pool_bytes=PAGES * device.chunk)
        mapper = Mapper(arena, member.core)
        assert account.lease(3 * device.chunk)
        mapper.submit([], [0, 1, 5])
        assert mapper.wait([0, 1, 5], 20)
        assert member.held() == account.charge() == 4 * device.chunk
        mapper.submit([1, 5], [])
        assert mapper.drain(20)
        mapper.check()
        assert member.held() == arena.created_bytes() == 2 * device.chunk
        assert_covered(device, arena)
        mapper.clear()
        assert mapper.drain(20)
        mapper.close()
        assert member.held() == arena.uncover() == device.chunk
        member.close()
        assert account.charge() == 0
