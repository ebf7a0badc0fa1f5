"""The policy by example. Its promises in general are in tests/sim/test_policy_properties.py."""

from __future__ import annotations

import pytest

from kvcached.policy import Standing, Target, fair_shares, fixed_weight, reclaim, target

GIB = 1 << 30


def busy(size: int, demand: int = 0, **more: int) -> Standing:
    return Standing(charge=size, in_use=size, demand=demand, working=True, **more)


def test_the_example_of_the_documentation() -> None:
    """docs/sharing.md works through these numbers: change both."""
    chat = Standing(charge=44, in_use=20, cached=20, warm=4, page=2, working=True)
    code = Standing(charge=20, in_use=20, demand=40, page=2, working=True)
    batch = Standing(guarantee=12, charge=16, in_use=2, cached=14, page=2)
    standings = [chat, code, batch]
    assert [each.want for each in standings] == [40, 60, 2]
    assert fair_shares(80, standings) == [34, 34, 12]
    assert reclaim(80, standings, [34, 34, 12]) == [(10, 0), (0, 0), (4, 0)]
    assert target(80, standings, 1) == Target(share=34, give=0, owed=0, grant=14, coming=14)


def test_an_idle_cache_is_wanted_by_nobody() -> None:
    idle = Standing(charge=100, in_use=1, cached=99)
    assert fair_shares(100, [idle, busy(0, 50)]) == [1, 50]
    assert target(100, [idle, busy(0, 50)], 0).give == 50


def test_the_cache_of_an_engine_at_work_is_kept_up_to_its_share() -> None:
    at_work = Standing(charge=100, in_use=1, cached=99, working=True)
    assert target(100, [at_work, busy(0, 80)], 0).give == 50
    assert target(100, [at_work, busy(0, 30)], 0).give == 30


def test_what_one_does_not_want_the_others_get() -> None:
    assert fair_shares(90, [busy(10), busy(0, 90), busy(0, 90)]) == [10, 40, 40]


def test_weights_divide_what_guarantees_leave_open() -> None:
    heavy, light = busy(0, 90, weight=fixed_weight(2)), busy(0, 90)
    assert fair_shares(90, [heavy, light]) == [60, 30]
    assert fair_shares(90, [heavy, busy(0, 90, guarantee=45)]) == [45, 45]
    assert fair_shares(90, [busy(0, 90, weight=fixed_weight(2), limit=50), light]) == [50, 40]


def test_a_limit_of_nothing_drains() -> None:
    drained = Standing(limit=0, charge=30, in_use=10, cached=20)
    assert target(100, [drained, busy(0)], 0) == Target(share=0, give=20, owed=10, grant=0)


def test_memory_in_use_becomes_a_debt_and_no_more_is_granted() -> None:
    greedy = busy(100, 500, page=10)
    late = busy(0, 30, page=10)
    assert target(100, [greedy, late], 0) == Target(share=70, give=0, owed=30, grant=0)
    assert target(100, [greedy, late], 1).grant == 30


def test_who_is_most_above_gives_first_and_others_are_left_alone() -> None:
    """With warm pages or cached ones: an engine at rest is not woken for a page."""
    rich = Standing(charge=60, in_use=0, cached=60)
    warm = Standing(charge=40, in_use=20, warm=20)
    shares = [0, 20, 30]
    assert reclaim(100, [rich, warm, busy(0, 30)], shares) == [(30, 0), (0, 0), (0, 0)]
    shares = [0, 20, 70]
    assert reclaim(100, [rich, warm, busy(0, 70)], shares) == [(60, 0), (10, 0), (0, 0)]


def test_debts_above_a_limit_save_nobody_from_giving_what_is_needed_now() -> None:
    over = Standing(limit=0, charge=50, in_use=50)
    idle = Standing(charge=50, cached=50)
    plan = reclaim(100, [over, idle, busy(0, 40)], fair_shares(100, [over, idle, busy(0, 40)]))
    assert plan[:2] == [(0, 50), (40, 0)]


def test_an_odd_page_goes_to_who_comes_first_and_stays() -> None:
    """Nine pages for two equals: five and four, and neither gives."""
    five, four = busy(10, 40, page=2), busy(8, 40, page=2)
    for i in range(2):
        assert target(18, [five, four], i) == Target(share=9, give=0, owed=0, grant=0)
        assert target(18, [four, four], i) == Target(share=9, give=0, owed=0, grant=2)


def test_a_page_on_its_way_out_is_nobodys() -> None:
    leaving = Standing(charge=60, in_use=10, cached=20, working=True)
    assert leaving.held == 30 and leaving.want == 30
    assert target(100, [leaving, busy(40, 30)], 0).give == 0, "the 30 that leave are enough"


def test_nothing_is_lost_at_the_size_of_a_device() -> None:
    capacity = 80 * GIB + 1
    shares = fair_shares(capacity, [busy(0, capacity, weight=fixed_weight(w)) for w in (1, 1e3)])
    assert sum(shares) in (capacity, capacity - 1)
    assert fair_shares(3 * GIB + 3, [busy(0, 9 * GIB)] * 3) == [GIB + 1] * 3


@pytest.mark.parametrize("weight", [0.0004, 0.001, 1.0, 1e6])
def test_every_weight_counts(weight: float) -> None:
    assert fixed_weight(weight) == weight * 1_000_000
    assert fixed_weight(1e-12) == 1
