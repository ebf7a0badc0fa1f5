"""The load: a slice of a real request trace, scaled down to models that run on two cores.

The slice keeps the trace's order of lengths and the rhythm of its arrivals. Lengths are divided
by a constant and clamped, arrivals are compressed, and prompts are token ids made from a seed,
because the trace carries no text. ``LoadShape`` holds these numbers and the report repeats them.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources

from kvcached.demo.models import Model

SLICE_FILE = "azure_conv_slice.csv"
FIRST_TOKEN_ID = 100  # below are special tokens


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of the trace: arrival in seconds from the slice's start, lengths in tokens."""

    at_s: float
    context_tokens: int
    generated_tokens: int


@dataclass(frozen=True, slots=True)
class Request:
    """One request of the demo. ``at_s`` counts from the start of its phase."""

    id: int
    phase: str
    engine: str
    at_s: float
    prompt: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class LoadShape:
    """How the trace becomes a load: counts, scaling and clamps (lengths in tokens)."""

    burst_a: int = 42
    burst_b: int = 104
    both_each: int = 28
    burst_a_span_s: float = 7.5
    burst_b_span_s: float = 4.5
    both_span_s: float = 7.0
    prompt_divisor: float = 8.0
    prompt_min: int = 64
    prompt_max: int = 192
    output_divisor: float = 2.0
    output_min: int = 48
    output_max: int = 120
    shared_prefix: int = 32
    seed: int = 11

    @property
    def total(self) -> int:
        """Requests in one run over all phases."""
        return self.burst_a + self.burst_b + 2 * self.both_each

    def paced(self, seconds: Mapping[str, float]) -> LoadShape:
        """The same requests, arriving as fast as this machine makes it a burst.

        ``seconds`` says for each phase how long engines without a shortage of memory take for its
        requests when all are sent at once. They arrive within half of that: fast enough that
        requests run side by side and need memory, slowly enough that not the prompts alone decide
        how long the first token takes.
        """
        return replace(
            self,
            burst_a_span_s=round(seconds["burst-a"] / 2, 2),
            burst_b_span_s=round(seconds["burst-b"] / 2, 2),
            both_span_s=round(seconds["both"] / 2, 2),
        )


PHASES = ("burst-a", "burst-b", "both")
PHASE_TITLES = {
    "burst-a": "A bursts, B rests",
    "burst-b": "B bursts, A rests",
    "both": "both are busy",
}


def read_slice() -> list[TraceRow]:
    """The rows of the bundled slice, in order of arrival."""
    source = resources.files("kvcached.demo") / "data" / SLICE_FILE
    with source.open() as stream:
        lines = (line for line in stream if not line.startswith("#"))
        return [
            TraceRow(float(row["at_s"]), int(row["context_tokens"]), int(row["generated_tokens"]))
            for row in csv.DictReader(lines)
        ]


def make_load(shape: LoadShape, models: dict[str, Model]) -> list[Request]:
    """The requests of all phases. ``models`` maps the engines' names ("A", "B") to their models.

    The same shape gives the same requests, prompts included, on every machine.
    """
    rows = iter(read_slice())
    rng = random.Random(shape.seed)
    prefixes = {
        engine: _tokens(rng, shape.shared_prefix, model.vocab) for engine, model in models.items()
    }
    load: list[Request] = []
    plan = (
        ("burst-a", ("A",), shape.burst_a, shape.burst_a_span_s),
        ("burst-b", ("B",), shape.burst_b, shape.burst_b_span_s),
        ("both", ("A", "B"), 2 * shape.both_each, shape.both_span_s),
    )
    for phase, engines, count, span_s in plan:
        for index, (at_s, row) in enumerate(_compressed(rows, count, span_s)):
            engine = engines[index % len(engines)]
            length = _clamp(
                row.context_tokens / shape.prompt_divisor, shape.prompt_min, shape.prompt_max
            )
            own = _tokens(rng, length - shape.shared_prefix, models[engine].vocab)
            outputs = _clamp(
                row.generated_tokens / shape.output_divisor, shape.output_min, shape.output_max
            )
            load.append(Request(len(load), phase, engine, at_s, prefixes[engine] + own, outputs))
    return load


def at_once(load: Sequence[Request], engine: str, count: int) -> list[Request]:
    """The first ``count`` requests of an engine, all to be sent at the same time."""
    return [replace(r, at_s=0.0) for r in load if r.engine == engine][:count]


def _compressed(
    rows: Iterator[TraceRow], count: int, span_s: float
) -> Iterator[tuple[float, TraceRow]]:
    """The next ``count`` rows with their arrivals compressed into ``span_s`` seconds."""
    chosen = [next(rows) for _ in range(count)]
    first, last = chosen[0].at_s, chosen[-1].at_s
    for row in chosen:
        yield (row.at_s - first) / max(last - first, 1e-9) * span_s, row


def _tokens(rng: random.Random, count: int, vocab: int) -> tuple[int, ...]:
    return tuple(rng.randrange(FIRST_TOKEN_ID, vocab) for _ in range(count))


def _clamp(value: float, low: int, high: int) -> int:
    return max(low, min(high, round(value)))
