"""Where models go: what holds for all models, hosts and losses."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcached.hosts.placement import Load, Placement, Room, fits, place, pressure

GIB = 1 << 30

rooms = st.builds(
    Room,
    memory_bytes=st.integers(0, 100),
    weights_bytes=st.none() | st.integers(0, 100),
    awake=st.none() | st.integers(1, 3),
)
hosts = st.dictionaries(st.sampled_from("abcdef"), rooms)


@st.composite
def many_loads(draw: st.DrawFn) -> list[Load]:
    names = draw(st.lists(st.sampled_from("klmnopqrst"), unique=True))
    return [
        Load(
            name,
            tokens_per_s=draw(st.floats(0, 1e4)),
            token_bytes=draw(st.integers(0, 1 << 20)),
            tpot_s=draw(st.floats(0.001, 1)),
            weights_bytes=draw(st.integers(0, 60)),
            replicas=draw(st.integers(1, 3)),
        )
        for name in names
    ]


def there(found: Placement, loads: list[Load], host: str) -> list[Load]:
    return [load for load in loads if host in found.places[load.model]]


@given(many_loads(), hosts)
def test_what_is_placed_fits_and_what_is_not_says_why(
    loads: list[Load], where: dict[str, Room]
) -> None:
    found = place(loads, where, {})
    assert set(found.places) == {load.model for load in loads}
    for host, room in where.items():
        assert fits(room, there(found, loads, host)) or not there(found, loads, host)
    for load in loads:
        places = found.places[load.model]
        assert len(set(places)) == len(places) <= load.replicas
        assert (len(places) < load.replicas) == (load.model in found.missing)
        if load.model in found.missing:
            for host in where.keys() - set(places):
                assert not fits(where[host], [*there(found, loads, host), load])


@given(many_loads(), hosts, st.sets(st.sampled_from("abcdef")))
def test_only_what_must_move_moves(
    loads: list[Load], where: dict[str, Room], dead: set[str]
) -> None:
    before = place(loads, where, {}).places
    alive = {host: room for host, room in where.items() if host not in dead}
    after = place(loads, alive, before).places
    for load in loads:
        stays = [host for host in before[load.model] if host in alive]
        assert list(after[load.model][: len(stays)]) == stays
    # And one that comes back takes nothing from the others.
    back = place(loads, where, after).places
    for load in loads:
        assert back[load.model][: len(after[load.model])] == after[load.model]


@given(many_loads(), hosts)
def test_no_second_replica_takes_the_place_of_a_first_one(
    loads: list[Load], where: dict[str, Room]
) -> None:
    alone = [
        Load(x.model, x.tokens_per_s / x.replicas, x.token_bytes, x.tpot_s, x.weights_bytes)
        for x in loads
    ]
    with_replicas, without = place(loads, where, {}), place(alone, where, {})
    served = {model for model, places in with_replicas.places.items() if places}
    assert served == {model for model, places in without.places.items() if places}


@given(many_loads(), hosts, st.randoms())
def test_the_order_in_which_hosts_are_seen_changes_nothing(
    loads: list[Load], where: dict[str, Room], random: object
) -> None:
    names = list(where)
    random.shuffle(names)  # type: ignore[attr-defined]
    assert place(loads, {name: where[name] for name in names}, {}) == place(loads, where, {})


def test_a_models_demand_and_a_hosts_pressure() -> None:
    """100 tokens a second of 1 MiB, each due in 50 ms, on 20 GiB of which weights take 10."""
    load = Load("m", 100.0, 1 << 20, 0.05, 10 * GIB)
    assert load.demand == 100 * (1 << 20) / 0.05
    assert pressure(Room(20 * GIB), [load]) == pytest.approx(load.demand / (10 * GIB))
    apart = Room(20 * GIB, weights_bytes=64 * GIB)
    assert pressure(apart, [load]) == pytest.approx(load.demand / (20 * GIB))
    assert pressure(Room(10 * GIB), [load]) == math.inf


def test_busy_models_go_apart_and_quiet_ones_beside_the_quieter() -> None:
    loads = [
        Load("busy", 1000, 1000, weights_bytes=GIB),
        Load("busy too", 900, 1000, weights_bytes=GIB),
        Load("quiet", 10, 1000, weights_bytes=GIB),
    ]
    found = place(loads, {"a": Room(10 * GIB), "b": Room(10 * GIB)}, {})
    assert found.places["busy"] != found.places["busy too"] == found.places["quiet"]


def test_models_of_which_nothing_is_known_spread() -> None:
    found = place([Load(name) for name in "klmn"], {"a": Room(9), "b": Room(9)}, {})
    assert sorted(found.places.values()) == [("a",), ("a",), ("b",), ("b",)]


def test_the_larger_memory_takes_more() -> None:
    loads = [Load(name, 100, 1000) for name in "klmnop"]
    places = place(loads, {"a": Room(2 * GIB), "b": Room(GIB)}, {}).places
    assert sum(where == ("a",) for where in places.values()) == 4


def test_why_a_replica_has_no_host() -> None:
    big, twice = Load("big", weights_bytes=9), Load("twice", replicas=2)
    assert "no host" in place([big], {}, {}).missing["big"]
    assert "9 bytes fit on no host" in place([big], {"a": Room(9)}, {}).missing["big"]
    assert "one a host" in place([twice], {"a": Room(9)}, {}).missing["twice"]


def test_models_that_take_turns_need_room_for_those_awake_only() -> None:
    loads = [Load(name, weights_bytes=4) for name in "klm"]
    assert not place(loads, {"a": Room(9, awake=2)}, {}).missing
    assert place(loads, {"a": Room(9)}, {}).missing
