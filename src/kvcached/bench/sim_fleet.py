"""The load of a simulated fleet and who goes to which GPU; see ``kvcached.bench.simulate``."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvcached.bench.share_load import Arrival, over_and_over
from kvcached.bench.sim_engine import Request
from kvcached.bench.sim_shapes import SHAPES, Device, Shape

PROMPT_MAX, OUTPUT_MAX = 3500, 1000


@dataclass(frozen=True, slots=True)
class Popularity:
    """How often models are asked. The one of rank r gets a part of all requests that falls with
    r ** -``zipf``. Each is asked in spells of ``busy_s`` seconds on average with ``rest_s`` between
    them, both exponentially distributed; ``busy_s`` of 0: all the time.
    """

    rate_per_model: float = 0.25
    zipf: float = 0.6
    busy_s: float = 30.0
    rest_s: float = 90.0

    def rates(self, models: int) -> list[float]:
        """Mean requests a second, by model."""
        weights = [1 / (rank + 1) ** self.zipf for rank in range(models)]
        return [self.rate_per_model * models * weight / sum(weights) for weight in weights]


@dataclass(frozen=True, slots=True)
class Model:
    """One model of the fleet with all its requests."""

    name: str
    shape: Shape
    rate: float
    requests: tuple[tuple[float, int, int], ...]

    def fresh(self) -> list[Request]:
        """Its requests, as nobody has seen them."""
        return [Request(at_s, prompt, output) for at_s, prompt, output in self.requests]

    def busy_part(self, device: Device) -> float:
        """The part of a GPU's time that its mean load takes, about."""
        if not self.requests:
            return 0.0
        prompts = sum(prompt for _, prompt, _ in self.requests) / len(self.requests)
        outputs = sum(output for _, _, output in self.requests) / len(self.requests)
        compute = 2 * self.shape.parameters * prompts / device.compute
        steps = outputs * self.shape.step_s(device, round(8 * prompts), 0) / 8  # eight at a time
        return self.rate * (compute + steps)


def make_models(
    count: int,
    mix: Sequence[str],
    popularity: Popularity,
    trace: Sequence[Arrival],
    *,
    seconds: float,
    seed: int,
) -> list[Model]:
    """A fleet. Sizes are dealt in turn, so popular models have all sizes; each model plays the
    trace from a row of its own on, its rhythm bent to the model's rate and spells.
    """
    models = []
    for index, rate in enumerate(popularity.rates(count)):
        draw = random.Random(f"{seed}/{index}")
        spells = list(_spells(popularity, draw, seconds))
        part = sum(end - begin for begin, end in spells) / seconds
        requests = tuple(_requests(trace, spells, rate / part if part else 0.0, draw))
        shape = SHAPES[mix[index % len(mix)]]
        models.append(Model(f"{shape.name}-{index}", shape, len(requests) / seconds, requests))
    return models


def _spells(
    popularity: Popularity, draw: random.Random, seconds: float
) -> Iterator[tuple[float, float]]:
    if not popularity.busy_s:
        yield 0.0, seconds
        return
    busy_part = popularity.busy_s / (popularity.busy_s + popularity.rest_s)
    at_s = 0.0 if draw.random() < busy_part else draw.expovariate(1 / popularity.rest_s)
    while at_s < seconds:
        end_s = min(seconds, at_s + draw.expovariate(1 / popularity.busy_s))
        yield at_s, end_s
        at_s = end_s + draw.expovariate(1 / popularity.rest_s)


def _requests(
    trace: Sequence[Arrival],
    spells: Sequence[tuple[float, float]],
    rate: float,
    draw: random.Random,
) -> Iterator[tuple[float, int, int]]:
    """The trace's rows, at ``rate`` within the spells."""
    if not rate:
        return
    scale = (len(trace) - 1) / (trace[-1].at_s - trace[0].at_s) / rate
    rows = over_and_over(trace, draw.randrange(len(trace)))
    _, row = next(rows)
    busy_s, passed_s = draw.random() / rate, 0.0
    for begin, end in spells:
        while busy_s < passed_s + end - begin:
            yield (
                begin + busy_s - passed_s,
                min(row.prompt_tokens, PROMPT_MAX),
                max(1, min(row.output_tokens, OUTPUT_MAX)),
            )
            gap_s, row = next(rows)
            busy_s += gap_s * scale
        passed_s += end - begin


def place(
    models: Sequence[Model], gpus: int, device: Device, headroom: float
) -> list[list[Model]] | None:
    """Each model to one GPU: the heaviest first, always to the least busy GPU with room for its
    weights and some KV cache. None where they do not fit. Both sides have the same places.
    """
    room = [round(device.memory_bytes * (1 - headroom))] * gpus
    busy = [0.0] * gpus
    places: list[list[Model]] = [[] for _ in range(gpus)]
    order = sorted(models, key=lambda m: (-m.shape.fixed_bytes, -m.busy_part(device), m.name))
    for model in order:
        need = model.shape.fixed_bytes + least_kv_bytes(model.shape)
        fitting = [gpu for gpu in range(gpus) if room[gpu] >= need]
        if not fitting:
            return None
        gpu = min(fitting, key=lambda one: (busy[one], -room[one], one))
        places[gpu].append(model)
        room[gpu] -= need
        busy[gpu] += model.busy_part(device)
    return places


def least_kv_bytes(shape: Shape) -> int:
    """Room for one request of the greatest length."""
    return (PROMPT_MAX + OUTPUT_MAX + 16) * shape.token_bytes
