"""What the mapping thread does on every backend: order, fences, books, and refusals."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from devices import Device, HostDevice
from test_arena import PAGES, assert_books_agree, open_arena
from test_faults import FOR_GOOD, assert_nothing_left, failing

from kvcached.errors import DriverError, InvalidArgumentError, LedgerError, OutOfMemoryError
from kvcached.ledger import Ledger
from kvcached.vmm_ops import Mapper

PATIENCE_S = 20.0


class Instance:
    """A mapper with its arena and its books. The test plays the page pool: what it wants it has
    leased, what it drops it does not count on any more."""

    def __init__(self, device: Device, ledger: Ledger, regions: int = 1) -> None:
        self.device = device
        self.arena = open_arena(device, regions, pool_bytes=1 << 40)
        self.page = self.arena.page_bytes
        self.member = ledger.attach("one", "one", self.page)
        self.account = ledger.join("one", "one", self.page)
        self.mapper = Mapper(self.arena, self.member.core)
        self.wanted = {0}
        assert self.member.pin(self.page)
        self.mapper.need([0])
        assert self.mapper.wait([0], PATIENCE_S)

    def submit(
        self, unmap: Sequence[int] = (), needed: Sequence[int] = (), ahead: Sequence[int] = ()
    ) -> None:
        for page in {*needed, *ahead} - self.wanted:
            assert self.account.lease(self.page), page
        self.mapper.submit(unmap, needed, ahead)
        self.wanted = (self.wanted - set(unmap)) | {*needed, *ahead}

    def wait(self, pages: Sequence[int]) -> None:
        assert self.mapper.wait(pages, PATIENCE_S)

    def finish(self) -> None:
        """Waits for every page that is wanted, whatever was refused, and for every fence."""
        self.device.backend.inject_off()
        self.device.backend.hold_fences(False)
        self.device.backend.pass_fences()
        self.mapper.submit([], [])  # a fence that could not be recorded
        self.wait(sorted(self.wanted))
        assert self.mapper.drain(PATIENCE_S)

    def settled(self) -> None:
        """Nothing is on its way: what is wanted is what exists, and what is charged."""
        assert self.mapper.drain(PATIENCE_S)
        self.mapper.check()
        assert self.arena.mapped_pages() == sorted(self.wanted)
        assert self.arena.pooled_bytes() == 0
        size = len(self.wanted) * self.page
        assert self.arena.created_bytes() == size + self.arena.quarantined_bytes()
        assert self.member.held() == self.account.charge() == self.arena.created_bytes()
        assert_books_agree(self.device, self.arena)

    def write(self, page: int, value: int) -> None:
        self.device.write(self.arena.address + page * self.device.chunk, value, self.device.chunk)

    def read(self, page: int) -> bytes:
        return self.device.read(self.arena.address + page * self.device.chunk, self.device.chunk)

    def end(self) -> None:
        """Everything goes, and nothing is left in ledger, driver and kernel."""
        self.finish()
        self.mapper.clear()
        self.wanted = set()
        assert self.mapper.drain(PATIENCE_S)
        self.mapper.close()
        assert self.member.held() == self.account.charge() == 0
        del self.mapper, self.arena
        assert_nothing_left(self.device)
        assert self.device.backend.live_fences() == 0
        self.account.close()
        self.member.close()


@pytest.fixture
def ledger(device: Device, tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "ledger", "host:mapper", 64 * 4 * device.chunk) as opened:
        yield opened


@pytest.fixture
def one(device: Device, ledger: Ledger) -> Instance:
    return Instance(device, ledger)


@pytest.mark.parametrize("regions", [1, 3])
def test_pages_come_and_go(device: Device, ledger: Ledger, regions: int) -> None:
    one = Instance(device, ledger, regions)
    one.submit(needed=[1, 5], ahead=[2, 3])
    one.wait([1, 5])
    assert one.mapper.missing([1, 5]) == 0
    one.settled()
    one.submit(unmap=[1, 3], needed=[2], ahead=[4])
    one.wait([2])
    one.settled()
    one.submit()
    one.settled()
    one.end()


def test_a_fence_keeps_pages_until_it_has_passed(one: Instance) -> None:
    one.submit(needed=[1, 2, 3])
    one.wait([1, 2, 3])
    one.write(1, 0x11)
    one.device.backend.hold_fences()
    one.submit(unmap=[1, 2])
    one.submit(unmap=[3], ahead=[4])
    one.wait([4])  # maps go on meanwhile
    assert not one.mapper.drain(0.05)
    assert one.arena.mapped_pages() == [0, 1, 2, 3, 4]
    assert one.read(1) == b"\x11" * one.device.chunk
    assert one.account.charge() == 5 * one.page
    one.device.backend.pass_fences(1)
    until(lambda: one.arena.mapped_pages() == [0, 3, 4])
    assert not one.mapper.drain(0.05)
    one.mapper.check()
    one.device.backend.pass_fences()
    one.settled()
    assert one.device.backend.live_fences() == 0


def until(condition: object) -> None:
    assert callable(condition)
    for _ in range(2000):
        if condition():
            return
        threading.Event().wait(0.005)
    raise AssertionError("it did not happen")


def test_a_page_wanted_again_is_kept_with_its_contents(one: Instance) -> None:
    one.submit(needed=[1, 2, 3])
    one.wait([1, 2, 3])
    one.write(1, 0x11)
    one.write(2, 0x22)
    one.device.backend.hold_fences()
    one.submit(unmap=[1, 2, 3])
    one.submit(needed=[1], ahead=[2])
    one.wait([1])
    assert one.mapper.counters()["kept"] == 2
    assert one.account.charge() == 4 * one.page, "the new leases are refunded"
    one.device.backend.pass_fences()
    one.settled()
    assert one.read(1) == b"\x11" * one.device.chunk
    assert one.read(2) == b"\x22" * one.device.chunk


def test_a_pinned_page_that_is_still_there_is_not_booked_twice(one: Instance) -> None:
    """Who has no scheduler pins what it needs: for a page on its way out, once too often."""
    one.submit(needed=[1])
    one.wait([1])
    one.device.backend.hold_fences()
    one.submit(unmap=[1])
    assert one.member.pin(one.page)
    one.mapper.need([1])
    one.wanted.add(1)
    one.wait([1])
    assert one.member.held() == one.arena.created_bytes() == 2 * one.page
    one.device.backend.pass_fences()
    one.settled()


def test_a_kept_page_needs_a_fence_of_its_own_the_next_time(one: Instance) -> None:
    one.submit(needed=[1])
    one.wait([1])
    one.device.backend.hold_fences()
    one.submit(unmap=[1])
    one.submit(needed=[1])
    one.submit(unmap=[1])
    one.device.backend.pass_fences(1)
    assert not one.mapper.drain(0.05)
    assert one.arena.mapped_pages() == [0, 1]
    one.device.backend.pass_fences(1)
    one.settled()


def test_a_page_refused_ahead_waits_until_it_is_needed(one: Instance) -> None:
    with failing(one.device, 1, operation="create", times=FOR_GOOD):
        one.submit(ahead=[1, 2, 3])
        assert one.mapper.drain(PATIENCE_S)
    assert one.mapper.counters()["ahead_refused"] == 3
    assert one.arena.mapped_pages() == [0]
    assert one.account.charge() == 4 * one.page, "the pool counts on them"
    one.mapper.check()
    one.submit(needed=[1], unmap=[2])
    one.wait([1])
    assert one.mapper.drain(PATIENCE_S)
    assert one.arena.mapped_pages() == [0, 1], "nobody has asked for page 3 again"
    assert one.mapper.counters()["cancelled"] == 1
    assert one.account.charge() == 3 * one.page, "page 2 is refunded"
    one.submit(unmap=[3])
    one.settled()
    one.end()


@pytest.mark.parametrize("code", ["out_of_memory", "driver"])
def test_needed_pages_are_all_mapped_or_none(one: Instance, code: str) -> None:
    expected = OutOfMemoryError if code == "out_of_memory" else DriverError
    one.device.backend.inject(2, code, "create", FOR_GOOD)  # type: ignore[arg-type]
    one.submit(needed=[1, 2, 3])
    for _ in range(2):
        with pytest.raises(expected, match="injected"):
            one.mapper.wait([1, 2, 3], PATIENCE_S)
        one.device.backend.inject(2, code, "create", FOR_GOOD)  # type: ignore[arg-type]
    assert one.arena.mapped_pages() == [0] and one.mapper.missing([0, 1, 2, 3]) == 3
    assert one.account.charge() == 4 * one.page, "they are still leased"
    one.mapper.check()
    one.device.backend.inject_off()
    one.wait([1, 2, 3])
    one.settled()


def test_pages_that_were_given_up_cost_nothing(one: Instance) -> None:
    with failing(one.device, 1, operation="create", times=FOR_GOOD):
        one.submit(needed=[1, 2])
        with pytest.raises(OutOfMemoryError):
            one.mapper.wait([1, 2], PATIENCE_S)
        one.mapper.give_up([0, 1, 2])
    assert one.member.held() == one.account.charge() == one.page
    one.mapper.check()
    one.wait([1])  # leased again by the member itself
    one.submit(unmap=[2])
    one.settled()


def test_a_page_given_up_needs_a_lease_again(one: Instance, ledger: Ledger) -> None:
    with failing(one.device, 1, operation="create", times=FOR_GOOD):
        one.submit(needed=[1])
        with pytest.raises(OutOfMemoryError):
            one.mapper.wait([1], PATIENCE_S)
    one.mapper.give_up([1])
    ledger.set_limit("one", one.page)
    with pytest.raises(OutOfMemoryError, match=f"no lease for {one.page} bytes"):
        one.mapper.wait([1], PATIENCE_S)
    ledger.set_limit("one", None)
    one.wait([1])
    one.settled()


@pytest.mark.parametrize("operation", ["record_fence", "fence_done"])
def test_without_a_fence_pages_stay_until_the_next_submission(
    one: Instance, operation: str
) -> None:
    one.submit(needed=[1, 2])
    one.wait([1, 2])
    with failing(one.device, 1, code="driver", operation=operation, times=FOR_GOOD):
        one.submit(unmap=[1, 2])
        assert not one.mapper.drain(PATIENCE_S), "it can do nothing"
    assert one.mapper.counters()["fence_failures"] == 1
    assert one.arena.mapped_pages() == [0, 1, 2]
    assert one.account.charge() == 3 * one.page
    one.mapper.check()
    one.submit(needed=[2])
    one.wait([2])
    one.settled()
    assert one.mapper.counters()["kept"] == 1


def test_unmapped_handles_serve_the_maps_that_wait(one: Instance) -> None:
    if not isinstance(one.device, HostDevice):
        pytest.skip("elsewhere the fence may pass after the maps are done")
    one.submit(needed=[1, 2, 3])
    one.wait([1, 2, 3])
    before = one.arena.counters()["creates"]
    one.submit(unmap=[1, 2, 3], ahead=[4, 5])
    one.settled()  # and nothing is kept
    assert one.arena.counters()["creates"] == before


def test_wrong_pages_are_named_and_change_nothing(one: Instance) -> None:
    one.submit(needed=[1], ahead=[2])
    one.wait([1])
    one.settled()
    for unmap, needed, ahead, message in (
        ([5], [], [], "page 5 is not mapped"),
        ([1, PAGES], [3], [4], f"page {PAGES} is outside"),
        ([1], [-1], [], "page -1 is outside"),
        ([1, 1], [], [], "page 1 is named twice"),
        ([1], [3, 1], [], "page 1 is named twice"),
        ([], [3], [3], "page 3 is named twice"),
        ([1], [3], [2], "page 2 is mapped already"),
    ):
        for _ in range(2):
            with pytest.raises(InvalidArgumentError, match=message):
                one.mapper.submit(unmap, needed, ahead)
        one.settled()
    for call in (one.mapper.missing, one.mapper.give_up, lambda pages: one.mapper.wait(pages, 0)):
        with pytest.raises(InvalidArgumentError, match="outside"):
            call([PAGES])
    with pytest.raises(InvalidArgumentError, match="page 7 is not wanted"):
        one.mapper.wait([1, 7], 0)
    with pytest.raises(InvalidArgumentError, match="must be empty"):
        Mapper(one.arena, one.member.core)


def test_threads_may_wait_for_the_same_pages_and_for_others(one: Instance) -> None:
    with ThreadPoolExecutor(8) as threads:
        for turn in range(40):
            pages = [1 + (turn + step) % 7 for step in range(4)]
            one.device.backend.inject(1 + turn % 5, times=1 + turn % 3)
            one.submit(needed=pages)

            def wait(page: int) -> None:
                while True:
                    try:
                        return one.wait([page])
                    except (OutOfMemoryError, DriverError):
                        continue

            for answer in [threads.submit(wait, page) for page in pages * 2]:
                answer.result()
            one.device.backend.inject_off()
            one.finish()
            one.settled()
            one.submit(unmap=pages)
    one.end()


def test_close_leaves_mapped_what_a_fence_still_holds(one: Instance) -> None:
    device = one.device
    one.submit(needed=[1, 2])
    one.wait([1, 2])
    device.backend.hold_fences()
    one.submit(unmap=[1])
    with failing(device, 1, operation="create", times=FOR_GOOD):
        one.submit(ahead=[5])
        until(lambda: one.mapper.counters()["ahead_refused"] == 1)
    one.mapper.close()
    one.mapper.close()
    assert one.arena.mapped_pages() == [0, 1, 2]
    assert one.member.held() == one.account.charge() == 3 * one.page, "what never came is refunded"
    assert one.mapper.wait([2], 0)
    assert not one.mapper.drain(0)
    for call in (
        lambda: one.mapper.submit([], [3]),
        lambda: one.mapper.need([3]),
        lambda: one.mapper.wait([5], 0),
        one.mapper.clear,
    ):
        with pytest.raises(InvalidArgumentError, match="closed"):
            call()
    del call, one.mapper, one.arena
    assert_nothing_left(device)
    assert device.backend.live_fences() == 0


def test_close_keeps_nothing_that_comes_out_of_quarantine(one: Instance) -> None:
    one.submit(needed=[1])
    one.wait([1])
    with failing(one.device, 1, code="driver", operation="unmap", times=FOR_GOOD):
        one.submit(unmap=[1])
        until(lambda: one.arena.quarantined_bytes() > 0)
        assert one.mapper.drain(PATIENCE_S)
    one.mapper.close()
    assert one.arena.quarantined_bytes() == one.arena.pooled_bytes() == 0
    assert one.member.held() == one.account.charge() == one.page, "the pinned page"


def test_without_a_place_in_the_ledger_nothing_is_mapped(one: Instance) -> None:
    one.member.close()
    with pytest.raises(LedgerError, match="place in the ledger"):
        one.mapper.submit([], [1])
    one.mapper.check()


SCRIPT: tuple[tuple[Sequence[int], Sequence[int], Sequence[int]], ...] = (
    ((), (1, 2), (3,)),
    ((2,), (3,), (4, 5)),
    ((1, 5), (2,), ()),
    ((3, 4), (1,), (6,)),
)


@pytest.mark.parametrize("times", [1, 4, FOR_GOOD], ids=["once", "four", "for-good"])
@pytest.mark.parametrize("code", ["out_of_memory", "driver"])
@pytest.mark.parametrize("regions", [1, 3])
def test_every_call_of_every_step_may_fail(
    device: Device, ledger: Ledger, regions: int, code: str, times: int
) -> None:
    """Whatever is refused: the books are exact, the next step works, and nothing is left."""
    for nth in itertools.count(1):
        one = Instance(device, ledger, regions)
        calls = device.backend.calls()
        device.backend.inject(nth, code, None, times)  # type: ignore[arg-type]
        for unmap, needed, ahead in SCRIPT:
            one.submit(unmap, needed, ahead)
            with contextlib.suppress(OutOfMemoryError, DriverError):
                one.wait(needed)
            one.mapper.check()
        one.mapper.drain(PATIENCE_S)
        assert one.member.held() >= one.arena.created_bytes()
        reached = device.backend.calls() - calls >= nth
        one.finish()
        one.settled()
        one.end()
        if not reached:
            break
    assert nth > 10


@pytest.mark.parametrize("faults", [False, True], ids=["no-faults", "faults"])
@pytest.mark.parametrize("seed", range(4))
def test_random_commands_against_a_model(
    device: Device, ledger: Ledger, seed: int, faults: bool
) -> None:
    """The model: which pages are wanted, and what those hold that a step has written."""
    rng = random.Random(seed)
    one = Instance(device, ledger)
    backend, contents = device.backend, {}
    for _ in range(250):
        if faults and rng.random() < 0.3:
            code = rng.choice(["out_of_memory", "driver"])
            backend.inject(rng.randint(1, 12), code, None, rng.randint(1, 4))
        backend.hold_fences(rng.random() < 0.5)
        pages = rng.sample(range(1, PAGES), rng.randint(0, PAGES - 1))
        dropped = [page for page in pages if page in one.wanted and rng.random() < 0.6]
        rest = [page for page in pages if page not in dropped]
        needed = [page for page in rest if rng.random() < 0.6]
        ahead = [page for page in rest if page not in needed and page not in one.wanted]
        one.submit(dropped, needed, ahead)
        for page in dropped:
            contents.pop(page, None)
        backend.pass_fences(rng.randint(0, 2))
        while True:
            try:
                one.wait(needed)
            except (OutOfMemoryError, DriverError):
                assert faults
                continue
            break
        for page in needed:
            contents[page] = rng.randrange(1, 256)
            one.write(page, contents[page])
        one.mapper.check()
        for page, value in contents.items():
            assert one.read(page) == bytes([value]) * device.chunk
    one.finish()
    one.settled()
    one.end()
