"""Which host serves which model. Pure functions.

A model's demand is the rate at which its tokens must move through the KV cache for every answer to
keep its pace: tokens a second, times the bytes of a token, over the time that an output token may
take. A host's KV pressure is the demand of its models over the memory that is left for their
caches. Placing by it is the idea of Prism (arXiv 2505.04021).

What is placed stays: only replicas without a living host are placed, most demand first, each where
the pressure is lowest afterwards. First one replica of every model, then the second ones.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Load:
    """What one model asks of a host."""

    model: str
    tokens_per_s: float = 0.0
    """Of all its replicas together."""
    token_bytes: int = 0
    """Of KV cache."""
    tpot_s: float = 0.1
    """The time that an output token may take; above 0."""
    weights_bytes: int = 0
    replicas: int = 1

    @property
    def demand(self) -> float:
        """Of one replica: bytes a second, over the target."""
        return self.tokens_per_s * self.token_bytes / self.tpot_s / self.replicas


@dataclass(frozen=True, slots=True)
class Room:
    """What a host has for models."""

    memory_bytes: int
    """For KV caches; for weights too where ``weights_bytes`` is None, as on a GPU."""
    weights_bytes: int | None = None
    """Memory apart for weights: the host's own, beside a pool of KV cache."""
    awake: int | None = None
    """Models that hold their weights at once; None: all."""


Hosts = Mapping[str, Room]
Places = Mapping[str, tuple[str, ...]]
"""By model, the hosts of its replicas: no host twice."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The outcome."""

    places: Places
    missing: Mapping[str, str]
    """Models with fewer replicas than wanted, and why."""


def pressure(room: Room, loads: Iterable[Load]) -> float:
    """A host's KV pressure with these models; infinite where nothing is left for their caches."""
    loads = tuple(loads)
    demand = sum(load.demand for load in loads)
    free = room.memory_bytes
    if room.weights_bytes is None:
        free -= _weights(room, loads)
    if free <= 0:
        return math.inf if loads else 0.0
    return demand / free


def fits(room: Room, loads: Sequence[Load]) -> bool:
    """Whether the weights of these models are all there at once, with room for caches."""
    weights = _weights(room, loads)
    if room.weights_bytes is None:
        return weights < room.memory_bytes
    return weights <= room.weights_bytes


def place(loads: Sequence[Load], hosts: Hosts, before: Places) -> Placement:
    """Places every replica that has no host yet.

    Args:
        loads: all models, by different names.
        hosts: the hosts that live now.
        before: where replicas were; those on hosts that live stay there, up to the number wanted.
    """
    by_name = {load.model: load for load in loads}
    places = {
        load.model: [h for h in before.get(load.model, ()) if h in hosts][: load.replicas]
        for load in loads
    }
    on_host = {h: [by_name[m] for m, where in places.items() if h in where] for h in hosts}
    missing: dict[str, str] = {}
    for number in range(max((load.replicas for load in loads), default=0)):
        wanted = [load for load in loads if load.replicas > number]
        for load in sorted(wanted, key=lambda each: (-each.demand, -each.weights_bytes)):
            if len(places[load.model]) > number or load.model in missing:
                continue
            host = _best(load, hosts, on_host)
            if host is None:
                missing[load.model] = _why(load, hosts, places[load.model])
                continue
            places[load.model].append(host)
            on_host[host].append(load)
    return Placement({model: tuple(where) for model, where in places.items()}, missing)


def _best(load: Load, hosts: Hosts, on_host: Mapping[str, list[Load]]) -> str | None:
    """The host with the lowest pressure afterwards, then the fewest models and the most room."""
    best: tuple[tuple[float, float, int, str], str] | None = None
    for name, room in hosts.items():
        there = on_host[name]
        if load in there or not fits(room, [*there, load]):
            continue
        after = pressure(room, [*there, load])
        rank = (after, len(there), -room.memory_bytes, name)
        if best is None or rank < best[0]:
            best = (rank, name)
    return None if best is None else best[1]


def _why(load: Load, hosts: Hosts, where: Sequence[str]) -> str:
    if not hosts:
        return "no host is there"
    others = len(hosts) - len(where)
    if others == 0:
        return f"{load.replicas} replicas are wanted on {len(hosts)} hosts: one a host"
    return f"its weights of {load.weights_bytes} bytes fit on no host"


def _weights(room: Room, loads: Iterable[Load]) -> int:
    """The most that the weights of these models can take at once."""
    sizes = (load.weights_bytes for load in loads)
    return sum(sizes) if room.awake is None else sum(heapq.nlargest(room.awake, sizes))
