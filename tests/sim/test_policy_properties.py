"""What the policy promises, on tens of thousands of random devices.

Each property is checked on a sample in ``make test`` and in full in ``make soak``. The oracle of
the fair share is not a second water filling but what characterises its result; the properties of
whole devices come from playing instances with a steady demand until nothing moves any more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcached.policy import (
    WEIGHT_UNIT,
    Standing,
    fair_shares,
    fixed_weight,
    grant,
    reclaim,
    target,
)

SAMPLE, FULL = 300, 10_000
GIB = 1 << 30


def whole_pages(size: int, page: int) -> int:
    return size // page * page


def property_of(strategy: st.SearchStrategy[Any]) -> Callable[[Callable[[Any], None]], Any]:
    """Makes a test of a check: a repeatable sample, and the full number under ``slow``."""

    def make(check: Callable[[Any], None]) -> Any:
        cases = [SAMPLE, pytest.param(FULL, marks=pytest.mark.slow)]

        @pytest.mark.parametrize("cases", cases)
        def test(cases: int) -> None:
            settings(
                max_examples=cases,
                deadline=None,
                database=None,
                derandomize=cases == SAMPLE,
                suppress_health_check=list(HealthCheck),
            )(given(strategy)(check))()

        test.__doc__ = check.__doc__
        return test

    return make


# --- random devices

WEIGHTS = st.one_of(st.sampled_from([0.001, 0.5, 1.0, 2.0, 1000.0]), st.floats(0.001, 1000.0)).map(
    fixed_weight
)
PAGES = st.sampled_from([1, 3, 64, 100, 2 << 20])


@st.composite
def devices(draw: st.DrawFn) -> tuple[int, list[Standing]]:
    """What can be lent and up to eight accounts; floors fit, as the ledger sees to."""
    count = draw(st.integers(1, 8))
    unit = draw(st.sampled_from([1, 7, 1 << 20, 5 * GIB + 1]))
    lendable = draw(st.integers(1, 64)) * unit + draw(st.integers(0, unit))
    left = lendable
    standings = []
    for _ in range(count):
        guarantee = draw(st.one_of(st.just(0), st.integers(0, left)))
        left -= guarantee
        limit = draw(st.one_of(st.none(), st.integers(guarantee, 2 * lendable)))
        page = min(draw(PAGES), lendable)
        amounts = st.integers(0, 2 * lendable // page).map(page.__mul__) | st.just(0)
        in_use, cached, warm = draw(amounts), draw(amounts), draw(amounts)
        standings.append(
            Standing(
                guarantee=guarantee,
                limit=limit,
                weight=draw(WEIGHTS),
                charge=in_use + cached + warm + draw(amounts),
                in_use=in_use,
                cached=cached,
                warm=warm,
                demand=draw(amounts),
                page=page,
                working=draw(st.booleans()),
            )
        )
    return lendable, standings


def bounds(lendable: int, each: Standing) -> tuple[int, int]:
    low = each.guarantee
    return low, max(low, min(each.want, lendable if each.limit is None else each.limit))


@property_of(devices())
def test_guarantees_hold(device: tuple[int, list[Standing]]) -> None:
    """No share and no reclaim goes below a guarantee, and a lease within one is never refused."""
    lendable, standings = device
    shares = fair_shares(lendable, standings)
    for i, (each, share) in enumerate(zip(standings, shares, strict=True)):
        plan = target(lendable, standings, i)
        assert plan.share == share >= each.guarantee
        left = each.held - plan.give - plan.owed
        assert left >= min(each.held, each.guarantee)
        assert each.held + plan.grant >= whole_pages(each.guarantee, each.page)


@property_of(devices())
def test_limits_hold(device: tuple[int, list[Standing]]) -> None:
    """No share and no lease goes above a limit, and what is above it goes back."""
    lendable, standings = device
    for i, each in enumerate(standings):
        plan = target(lendable, standings, i)
        if each.limit is None:
            continue
        assert plan.share <= each.limit
        assert plan.grant == 0 or each.held + plan.grant <= each.limit
        unused = each.held - each.in_use
        if each.held > each.limit:
            left = each.held - plan.give - plan.owed
            assert left < each.limit + each.page
            over = each.held - each.limit
            assert plan.give >= whole_pages(min(unused, over), each.page) or left <= each.limit


@property_of(devices())
def test_shares_are_weighted_max_min(device: tuple[int, list[Standing]]) -> None:
    """A share that is below what its account may have is not smaller, by weight, than any other
    share that could be lowered: the characterisation of weighted max-min fairness."""
    lendable, standings = device
    shares = fair_shares(lendable, standings)
    limits = [bounds(lendable, each) for each in standings]
    for i, (low_i, high_i) in enumerate(limits):
        assert low_i <= shares[i] <= high_i
        if shares[i] == high_i:
            continue
        for j, (low_j, _) in enumerate(limits):
            if shares[j] > low_j:  # a byte of rounding each
                assert (shares[i] + 1) * standings[j].weight > (
                    (shares[j] - 1) * standings[i].weight
                )


@property_of(devices())
def test_shares_use_all_that_is_wanted(device: tuple[int, list[Standing]]) -> None:
    """Work-conserving: shares add up to what can be lent, or to all that is wanted."""
    lendable, standings = device
    total = sum(fair_shares(lendable, standings))
    wanted = min(lendable, sum(bounds(lendable, each)[1] for each in standings))
    assert wanted - len(standings) < total <= lendable


@property_of(st.tuples(devices(), st.integers(0, 7), WEIGHTS))
def test_more_weight_is_never_less_memory(
    case: tuple[tuple[int, list[Standing]], int, int],
) -> None:
    """Raising a weight lowers no share of its account; equals but for the weight rank by it."""
    (lendable, standings), which, weight = case
    which %= len(standings)
    heavier = standings[:]
    heavier[which] = replace(standings[which], weight=standings[which].weight + weight)
    before = fair_shares(lendable, standings)
    after = fair_shares(lendable, heavier)
    assert after[which] >= before[which]
    twins = [*standings[:which], *standings[which + 1 :]]
    twins += [replace(standings[which], weight=w, guarantee=0) for w in (weight, 2 * weight)]
    *_, light, heavy = fair_shares(lendable, twins)
    assert heavy >= light


@property_of(devices())
def test_reclaim_takes_what_is_missing_and_no_more(device: tuple[int, list[Standing]]) -> None:
    """From nobody below its share; warm and cached before memory in use, all accounts together;
    and all that is needed where there is so much above the shares."""
    lendable, standings = device
    shares = fair_shares(lendable, standings)
    plan = reclaim(lendable, standings, shares)
    need = most = -lendable
    could = unused = 0
    for each, share, (give, owed) in zip(standings, shares, plan, strict=True):
        if give + owed:
            assert each.held - give - owed >= whole_pages(share, each.page)
        assert give <= max(0, each.held - min(each.in_use, each.held))
        need += each.claim + each.wanted(whole_pages(share, each.page))
        most += each.claim + each.wanted(each.edge(share))
        above = each.held - max(share, each.guarantee) - each.page
        could += max(0, above)
        unused += max(0, min(above, each.cached + each.warm) - 2 * each.page)
    taken = sum(give + owed for give, owed in plan)
    forced = sum(max(0, e.held - e.limit) + e.page for e in standings if e.limit is not None)
    assert taken < max(0, most) + max(e.page for e in standings) + forced
    assert taken >= min(max(0, need), could)
    assert sum(give for give, _ in plan) >= min(max(0, need), unused)


# --- devices that are played


@dataclass
class Player:
    """An instance with a steady demand: it would use ``need`` bytes if it had them."""

    page: int
    need: int
    weight: int = WEIGHT_UNIT
    guarantee: int = 0
    limit: int | None = None
    used: int = 0
    cached: int = 0
    demand: int = 0
    moved: int = 0

    def standing(self) -> Standing:
        return Standing(
            guarantee=self.guarantee,
            limit=self.limit,
            weight=self.weight,
            charge=self.used + self.cached,
            in_use=self.used,
            cached=self.cached,
            demand=self.demand,
            page=self.page,
            working=self.need > 0,
        )


def step(lendable: int, players: Sequence[Player], index: int) -> bool:
    """One turn of one player: it gives back, lets requests end, grows. Whether anything changed."""
    own = players[index]
    plan = target(lendable, [p.standing() for p in players], index)
    assert plan.give <= own.cached and plan.owed <= own.used
    own.cached -= plan.give
    own.used -= plan.owed  # requests end, and no new ones start while it owes
    before = own.used
    if not plan.owed:
        own.used += min(own.cached, max(0, own.need - own.used))
        own.cached -= own.used - before
    asked, own.demand = own.demand, max(0, own.need - own.used)
    if own.demand:
        standings = [p.standing() for p in players]
        others = sum(s.claim for i, s in enumerate(standings) if i != index)
        shares = fair_shares(lendable, standings)
        size = min(grant(lendable, standings, shares, index), own.demand)
        size = whole_pages(min(size, lendable - others - own.used - own.cached), own.page)
        own.used += max(0, size)
        own.demand -= max(0, size)
    moved = plan.give + plan.owed + own.used - before
    own.moved += moved
    assert sum(p.used + p.cached for p in players) <= lendable
    return moved > 0 or own.demand != asked


def settle(lendable: int, players: Sequence[Player], order: Sequence[int]) -> None:
    """Plays until nothing moves; that must come soon."""
    for _ in range(40 + 4 * len(players)):
        if sum(step(lendable, players, i) for i in order) == 0:
            return
    pytest.fail(f"pages still move: {players}")


@st.composite
def played(draw: st.DrawFn) -> tuple[int, list[Player], list[int]]:
    """A device whose memory is full of whatever, and players that take turns in any order."""
    count = draw(st.integers(2, 6))
    same = draw(st.booleans())
    page = draw(st.sampled_from([1, 4, 10]))
    lendable = draw(st.integers(20, 400))
    floors = left = lendable
    players = []
    for _ in range(count):
        if not same:
            page = draw(st.sampled_from([1, 4, 10]))
        guarantee = whole_pages(draw(st.one_of(st.just(0), st.integers(0, floors))), page)
        floors -= guarantee
        need = draw(st.integers(0, 2 * lendable // page)) * page
        limit = draw(st.one_of(st.none(), st.integers(guarantee, lendable)))
        used = whole_pages(draw(st.integers(0, left)), page)
        left -= used
        cached = whole_pages(draw(st.integers(0, left)), page)
        left -= cached
        weight = draw(WEIGHTS) if draw(st.booleans()) else WEIGHT_UNIT
        players.append(Player(page, need, weight, guarantee, limit, min(used, need), cached))
    order = draw(st.permutations(range(count)))
    return lendable, players, list(order)


@property_of(played())
def test_a_steady_demand_settles_at_the_fair_share(
    case: tuple[int, list[Player], list[int]],
) -> None:
    """It settles: within one page (the largest there is) of weighted max-min, nobody who waits
    could have a page of what is free, and nothing moves afterwards."""
    lendable, players, order = case
    settle(lendable, players, order)
    standings = [p.standing() for p in players]
    shares = fair_shares(lendable, standings)
    page = max(p.page for p in players)
    claims = sum(s.claim for s in standings)
    for own, each, share in zip(players, standings, shares, strict=True):
        if own.demand:
            assert each.held > share - page, (own, share)
            free = lendable - claims
            room = free if own.limit is None else min(free, own.limit - each.held)
            assert room < own.page, (own, share, free)
        assert own.limit is None or each.held < max(own.limit, own.guarantee) + own.page
    if all(own.demand for own in players) and len({p.page for p in players}) == 1:
        page += len(players)  # shares are rounded to bytes
        for own, each, share in zip(players, standings, shares, strict=True):
            assert abs(each.held - share) <= page, (own, share)
    moved = [p.moved for p in players]
    for i in order * 3:
        step(lendable, players, i)
    assert [p.moved for p in players] == moved


def test_what_several_give_for_one_page_is_not_taken_back() -> None:
    """The second and the third give a quarter and three quarters of the first one's page."""
    players = [
        Player(page=4, need=336, weight=fixed_weight(56)),
        Player(page=1, need=1, weight=fixed_weight(0.001), cached=4),
        Player(page=1, need=6, cached=3),
        Player(page=1, need=1),
    ]
    settle(342, players, [0, 1, 3, 2])
    assert [p.used for p in players] == [336, 0, 5, 1]


@property_of(st.tuples(st.integers(2, 400), st.sampled_from([1, 3, 7, 16]), st.integers(0, 400)))
def test_two_equals_exchange_no_page_after_settling(case: tuple[int, int, int]) -> None:
    """Two equal instances that both want everything, one of which had it all."""
    lendable, page, cached = case
    lendable = max(lendable, 2 * page)
    cached = whole_pages(min(cached, lendable), page)
    used = whole_pages(lendable - cached, page)
    players = [
        Player(page, 2 * lendable, used=used, cached=cached, guarantee=page),
        Player(page, 2 * lendable, guarantee=page),
    ]
    players[0].used = min(used, lendable - cached)
    settle(lendable, players, [0, 1])
    assert abs(players[0].used - players[1].used) <= page
    moved = [p.moved for p in players]
    for i in (1, 0, 0, 1) * 5:
        step(lendable, players, i)
    assert [p.moved for p in players] == moved
