"""When the requests of several models arrive: the rhythm and the lengths of a real trace, with
peaks that the models have in turn. Pure: the same seed gives the same requests everywhere.

The trace has no peaks of that kind, so its clock is bent: its gaps, divided by their mean, become
steps of the integral of a model's rate. Where the rate is twice as high, the same rows arrive twice
as fast; what is irregular about them stays.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvcached.bench.share_load import PREFIX_TOKENS, Arrival, mean_gap_s, over_and_over
from kvcached.demo.percentiles import percentile
from kvcached.units import ceil_div


@dataclass(frozen=True, slots=True)
class Peaks:
    """One after the other, each model's rate climbs to ``peak`` and falls again (a triangle of
    ``width_s`` seconds); otherwise it is ``base``. Rates in requests a second.
    """

    models: int
    base: float
    peak: float
    width_s: float

    @property
    def span_s(self) -> float:
        """From the first peak's beginning to the last one's end."""
        return self.models * self.width_s

    def window(self, model: int) -> tuple[float, float]:
        """When a model's peak begins and ends."""
        return model * self.width_s, (model + 1) * self.width_s

    def rate(self, model: int, at_s: float) -> float:
        begin, end = self.window(model)
        half = self.width_s / 2
        climb = max(0.0, 1 - abs(at_s - (begin + end) / 2) / half)
        return self.base + (self.peak - self.base) * climb

    def integral(self, model: int, at_s: float) -> float:
        """How many requests a model has had until then, on average."""
        begin, end = self.window(model)
        half = self.width_s / 2
        over = min(max(at_s - begin, 0.0), self.width_s)
        area = over**2 / 2 / half if over <= half else half - (end - begin - over) ** 2 / 2 / half
        return self.base * at_s + (self.peak - self.base) * area


@dataclass(frozen=True, slots=True)
class Lengths:
    """How the trace's lengths, in tokens, become requests: divided, then clamped; or fixed."""

    divisor: float = 1.0
    """Of the prompts, and of what two of them have in common."""
    answer_divisor: float = 0.0
    """Of the answers; 0: the same."""
    prompt_min: int = 16
    prompt_max: int = 3000
    output_min: int = 8
    output_max: int = 1000
    prompt: int = 0
    """Not 0: every prompt has this length, and every answer ``output``."""
    output: int = 0

    def of(self, row: Arrival) -> tuple[int, int]:
        if self.prompt:
            return self.prompt, self.output
        prompt = round(row.prompt_tokens / self.divisor)
        output = round(row.output_tokens / (self.answer_divisor or self.divisor))
        return (
            min(max(prompt, self.prompt_min), self.prompt_max),
            min(max(output, self.output_min), self.output_max),
        )

    @property
    def prefix_tokens(self) -> int:
        """What a name of the trace stands for, in tokens of a request."""
        return max(1, round(PREFIX_TOKENS / self.divisor))

    def prefixes(self, row: Arrival) -> list[int]:
        """The names of the prompt's parts that are not cut off."""
        if self.prompt:
            return []
        return list(row.prefixes[: ceil_div(self.of(row)[0], self.prefix_tokens)])


def times(peaks: Peaks, model: int, gaps: Iterator[float]) -> Iterator[float]:
    """When the requests of a model arrive, in order. ``gaps`` have a mean of 1."""
    total = peaks.integral(model, peaks.span_s)
    grid = [peaks.span_s * i / 4096 for i in range(4097)]
    areas = [peaks.integral(model, at_s) for at_s in grid]
    so_far = next(gaps)
    while so_far < total:
        right = max(1, bisect.bisect_left(areas, so_far))
        low, high = areas[right - 1], areas[right]
        part = (so_far - low) / (high - low) if high > low else 0.0
        yield grid[right - 1] + part * (grid[right] - grid[right - 1])
        so_far += next(gaps)


def rows_from(trace: Sequence[Arrival], first: int) -> Iterator[tuple[float, Arrival]]:
    """The trace from a row on, over and over: each row with the gap before it, over the mean."""
    mean_s = mean_gap_s(trace)
    for gap_s, row in over_and_over(trace, first):
        yield gap_s / mean_s if mean_s else 1.0, row


def schedule(
    peaks: Peaks, trace: Sequence[Arrival], lengths: Lengths, seed: str
) -> tuple[list[list[list[float]]], list[list[list[int]]]]:
    """By model: a list of [seconds, tokens of the prompt, tokens of the answer], and one of what
    the prompts begin with (``Lengths.prefixes``). Each model begins at another row of the trace.
    """
    draw = random.Random(seed)
    models, beginnings = [], []
    for model in range(peaks.models):
        rows = rows_from(trace, draw.randrange(len(trace)))
        taken: list[Arrival] = []

        def gaps(
            rows: Iterator[tuple[float, Arrival]] = rows, taken: list[Arrival] = taken
        ) -> Iterator[float]:
            for gap, row in rows:
                taken.append(row)
                yield gap

        asks = [
            [round(at_s, 4), *lengths.of(taken[index])]
            for index, at_s in enumerate(times(peaks, model, gaps()))
        ]
        models.append(asks)
        beginnings.append([lengths.prefixes(row) for row in taken[: len(asks)]])
    return models, beginnings


def plan(
    rates: Sequence[float],
    peaks: Peaks,
    trace: Sequence[Arrival],
    lengths: Lengths,
    *,
    seed: int,
    vocabulary: int,
    give_up_s: float,
) -> dict[str, Any]:
    """All load points, as JSON for the engines. ``give_up_s``: seconds after a point's span in
    which requests may still end. A model has the same requests at every side of a comparison.
    """
    # Long prompts side by side, too: what runs for the first time is slow.
    longest = lengths.prompt or lengths.prompt_max
    asks = [[0.0, min(512, longest), 8]] * 8 + [[0.0, longest, 16]] * 6
    warm_up = [asks for _ in range(peaks.models)]
    points: dict[str, Any] = {"warm-up": {"span_s": 0.0, "models": warm_up}}
    for rate in rates:
        at_rate = Peaks(peaks.models, peaks.base, rate, peaks.width_s)
        models, beginnings = schedule(at_rate, trace, lengths, f"{seed}/{rate:g}")
        points[point_name(rate)] = {
            "span_s": at_rate.span_s,
            "peaks": asdict(at_rate),
            "models": models,
            **({"prefixes": beginnings} if any(map(any, beginnings)) else {}),
        }
    return {
        "seed": seed,
        "vocabulary": vocabulary,
        "give_up_s": give_up_s,
        "lengths": asdict(lengths),
        "prefix_tokens": lengths.prefix_tokens,
        "points": points,
    }


def point_name(rate: float) -> str:
    return f"{rate:g}/s"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, median and p99 (nearest rank), in the unit given; empty without values."""
    if not values:
        return {}
    mean = sum(sorted(values)) / len(values)
    return {"mean": mean, "p50": percentile(values, 50), "p99": percentile(values, 99)}
