"""What a pool asks of others when it is short: all that it could use, and no more."""

from __future__ import annotations

import pytest

from kvcached.pages import PagePool
from kvcached.policy import Target
from kvcached.vmm_ops import Blocks

PAGE = 1 << 20


class Lender:
    """An account with so many pages left to lease."""

    def __init__(self, pages: int) -> None:
        self.left = pages * PAGE
        self.demand = 0

    def lease(self, size_bytes: int) -> bool:
        granted = size_bytes <= self.left
        self.left -= size_bytes if granted else 0
        return granted

    def give_back(self, size_bytes: int) -> None:
        self.left += size_bytes

    def leasable(self) -> int:
        return self.left

    def charge(self) -> int:
        return 0

    def set_demand(self, size_bytes: int) -> None:
        self.demand = size_bytes

    def publish(self, in_use: int, cached: int, warm: int, working: bool = False) -> None: ...

    def others_demand(self) -> int:
        return 0

    def pressed(self) -> bool:
        return False

    def version(self) -> int:
        return 1

    def target(self, page: int, demand: int = 0) -> Target:
        raise AssertionError("nobody waits")

    def press(self) -> None: ...

    def reap(self) -> int:
        return 0

    def count_reclaimed(self, size_bytes: int) -> None: ...


@pytest.fixture
def lender() -> Lender:
    return Lender(pages=2)


@pytest.fixture
def pool(lender: Lender) -> PagePool:
    blocks = Blocks(4 * 8, 4)  # 8 pages, the first one is there
    return PagePool(blocks, lender, PAGE, warm_low=1, warm_high=4, on_evict=lambda ids: None)


def test_a_queue_asks_for_all_of_it_at_once(pool: PagePool, lender: Lender) -> None:
    assert not pool.ensure(pool.blocks.available() + 12)
    assert lender.demand == 3 * PAGE
    pool.want(pool.blocks.available() + 17)
    assert lender.demand == 5 * PAGE


def test_nobody_asks_for_more_than_the_pool_has_room_for(pool: PagePool, lender: Lender) -> None:
    pool.want(10_000)
    assert lender.demand == (8 - pool.blocks.present_pages) * PAGE


def test_pages_about_to_leave_are_kept_instead(pool: PagePool, lender: Lender) -> None:
    assert pool.ensure(pool.blocks.available() + 8)
    pool.take_commands()
    pool.settle(idle=True)
    kept = 8 - pool.blocks.present_pages
    pool.want(10_000)
    leaving = len(pool.take_commands().unmap)  # type: ignore[union-attr]
    assert leaving > 0 and lender.demand == (kept - leaving) * PAGE


def test_enough_is_no_demand(pool: PagePool, lender: Lender) -> None:
    pool.want(pool.blocks.available())
    assert lender.demand == 0
