"""Every driver call of every operation is made to fail once, and again for good: nothing leaks,
the books stay exact, and the next operation works."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from devices import Device
from test_arena import PAGES, assert_books_agree, open_arena

from kvcached.errors import DriverError, OutOfMemoryError
from kvcached.vmm_ops import Arena

FOR_GOOD = 1_000_000
OPERATIONS: dict[str, Callable[[Arena], int]] = {
    "map": lambda arena: arena.map([3, 4, 6]),
    "unmap": lambda arena: arena.unmap([0, 1]),
    "trim": lambda arena: arena.trim(),
    "retry_quarantine": lambda arena: arena.retry_quarantine(),
}


@contextmanager
def failing(device: Device, nth: int, **how: object) -> Iterator[None]:
    device.backend.inject(nth, **how)  # type: ignore[arg-type]
    try:
        yield
    finally:
        device.backend.inject_off()


def prepare(device: Device, operation: str, regions: int, pool: bool) -> Arena:
    """Pages 0 and 1 mapped, some in the pool or in quarantine where that matters."""
    arena = open_arena(device, regions, pool_bytes=64 * device.chunk if pool else 0)
    arena.map([0, 1, 2, 5])
    if operation == "retry_quarantine":
        with failing(device, 1, operation="release", times=FOR_GOOD):
            arena.unmap([2])
        with failing(device, 1, times=FOR_GOOD):
            arena.unmap([5])
    else:
        arena.unmap([2, 5])
    device.write(arena.address, 0x77, device.chunk)
    return arena


def attempt(device: Device, arena: Arena, operation: str, nth: int, **how: object) -> bool:
    """Runs the operation under the fault and checks its answer. False: it made fewer calls."""
    before, mapped = arena.created_bytes(), arena.mapped_pages()
    calls = device.backend.calls()
    with failing(device, nth, **how):
        try:
            change = OPERATIONS[operation](arena)
        except (OutOfMemoryError, DriverError):
            assert operation == "map"
            assert arena.mapped_pages() == mapped
        else:
            sign = 1 if operation == "map" else -1
            assert arena.created_bytes() - before == sign * change
    assert_books_agree(device, arena)
    return device.backend.calls() - calls >= nth


def finish(device: Device, arena: Arena) -> None:
    """The next operations work, contents are intact, and nothing is left in the end."""
    if arena.is_mapped(0):
        assert device.read(arena.address, device.chunk) == b"\x77" * device.chunk
    arena.map([page for page in range(PAGES) if not arena.is_mapped(page)])
    assert arena.quarantined_bytes() == 0
    assert_books_agree(device, arena)
    arena.unmap(list(range(PAGES)))
    arena.trim()
    assert arena.created_bytes() == 0
    assert_books_agree(device, arena)


def assert_nothing_left(device: Device) -> None:
    assert device.backend.live_handles() == 0
    assert device.backend.live_reservations() == 0
    assert device.physical_bytes() == 0


@pytest.mark.parametrize("times", [1, FOR_GOOD], ids=["once", "for-good"])
@pytest.mark.parametrize("pool", [False, True], ids=["no-pool", "pool"])
@pytest.mark.parametrize("regions", [1, 3])
@pytest.mark.parametrize("operation", list(OPERATIONS))
def test_every_call_of_every_operation_may_fail(
    device: Device, operation: str, regions: int, pool: bool, times: int
) -> None:
    for nth in itertools.count(1):
        for code in ("out_of_memory", "driver"):
            arena = prepare(device, operation, regions, pool)
            reached = attempt(device, arena, operation, nth, code=code, times=times)
            finish(device, arena)
            del arena
            assert_nothing_left(device)
        if not reached:
            break
    assert nth > 1 or (operation == "trim" and not pool)


def test_opening_may_fail(device: Device) -> None:
    for code, expected in (("out_of_memory", OutOfMemoryError), ("driver", DriverError)):
        with failing(device, 1, code=code), pytest.raises(expected, match="injected"):
            open_arena(device)
        assert_nothing_left(device)


@pytest.mark.parametrize("pool", [False, True], ids=["no-pool", "pool"])
@pytest.mark.parametrize("regions", [1, 3])
def test_every_call_of_the_destructor_may_fail_once(
    device: Device, regions: int, pool: bool
) -> None:
    for nth in itertools.count(1):
        arena = prepare(device, "map", regions, pool)
        calls = device.backend.calls()
        with failing(device, nth, code="driver"):
            del arena
        assert_nothing_left(device)
        if device.backend.calls() - calls < nth:
            break
    assert nth > 3


@pytest.mark.parametrize("operation", ["unmap", "release", "free_reservation", None])
def test_destructor_that_fails_for_good_keeps_the_books(
    device: Device, operation: str | None
) -> None:
    """The memory cannot be given back; it must not be forgotten either, nor end the process."""
    arena = prepare(device, "map", 2, True)
    created = arena.created_bytes()
    with failing(device, 1, code="driver", operation=operation, times=FOR_GOOD):
        del arena
    left = device.backend.created_bytes()
    assert device.physical_bytes() == left
    assert left == (0 if operation == "free_reservation" else left)
    assert left <= created
    if operation in ("unmap", "free_reservation", None):
        assert device.backend.live_reservations() == 1


@pytest.mark.parametrize("seed", range(6))
def test_random_operations_under_random_faults(device: Device, seed: int) -> None:
    """Against a model: which pages are mapped, and what each of them holds."""
    rng = random.Random(seed)
    arena = open_arena(device, regions=1 + seed % 3, pool_bytes=seed * device.chunk)
    contents: dict[int, int] = {}
    for _ in range(150):
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
            arena.trim(rng.choice([0, device.chunk]))
        for page in present:
            del contents[page]
        for page in absent:
            contents[page] = rng.randrange(1, 256)
            device.write(arena.address + page * device.chunk, contents[page], device.chunk)
        assert arena.mapped_pages() == sorted(contents)
        assert_books_agree(device, arena)
        for page, value in contents.items():
            found = device.read(arena.address + page * device.chunk, device.chunk)
            assert found == bytes([value]) * device.chunk
    arena.retry_quarantine()
    assert arena.quarantined_bytes() == 0
    del arena
    assert_nothing_left(device)


def test_failure_is_told_in_words_and_counted(device: Device) -> None:
    arena = open_arena(device)
    with failing(device, 2, operation="create"), pytest.raises(OutOfMemoryError, match="page 4:"):
        arena.map([3, 4])
    assert arena.counters()["failures"] == 1
    assert arena.created_bytes() == 0
    arena.map([0])
    with failing(device, 1, code="driver", operation="unmap", times=FOR_GOOD):
        assert arena.unmap([0]) == 0
        assert arena.quarantined_bytes() == device.chunk
        with pytest.raises(DriverError, match="page 0 is in quarantine: injected"):
            arena.map([0])
        assert arena.map([1]) == device.chunk
    assert "unmap" in arena.last_failure()
    assert arena.retry_quarantine() == device.chunk
    assert_books_agree(device, arena)


def test_pooled_memory_of_other_sizes_serves_a_shortage(device: Device) -> None:
    """Two handles of the first region's size are kept; the second region's size is short."""
    arena = open_arena(device, regions=2, pool_bytes=2 * device.chunk)
    arena.map([0, 1])
    arena.unmap([0, 1])
    assert arena.pooled_bytes() == 2 * device.chunk
    with failing(device, 1, operation="create"):
        assert arena.map([0]) == device.chunk
    assert arena.pooled_bytes() == 0
    assert_books_agree(device, arena)


@pytest.mark.parametrize(
    "arguments", [(0,), (1, "nonsense"), (1, "driver", "nonsense"), (1, "driver", None, 0)]
)
def test_faults_that_make_no_sense_are_refused(
    device: Device, arguments: tuple[object, ...]
) -> None:
    with pytest.raises(ValueError, match="inject"):
        device.backend.inject(*arguments)  # type: ignore[arg-type]
