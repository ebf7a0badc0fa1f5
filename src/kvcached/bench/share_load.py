"""Load for ``kvcached bench share``: when requests arrive, and how long they are.

Everything is made from a seed, so the same seed gives the same requests on every machine.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import count, islice
from pathlib import Path

from kvcached.demo.trace import read_slice
from kvcached.errors import ConfigError

BURST_GAP_S = 30.0
"""Seconds from one burst to the next, on average (exponentially distributed)."""
BURST_SIZE = (2, 8)
"""The smallest and the largest burst, in requests."""
POISSON_GAP_S = 1.5
PROMPT_TOKENS = (64, 2048)
OUTPUT_TOKENS = (32, 512)
TRACE_ROWS = 4000
"""Rows that are read of a trace file."""
PREFIX_TOKENS = 512
"""Tokens that one name in Mooncake's traces stands for."""
LOADS = ("endless", "bursts", "poisson", "trace")


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: its arrival in simulated seconds, its lengths in tokens."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    prefixes: tuple[int, ...] = ()
    """A name for each ``PREFIX_TOKENS`` of the prompt, where the trace has them: where names are
    the same from the beginning on, prompts are.
    """


def arrivals(
    load: str, dice: random.Random, trace: Sequence[Arrival], seconds: float
) -> Iterator[Arrival]:
    """The requests of one instance, in order of arrival.

    ``endless`` has no end and arrives at once: whoever serves it takes the next request whenever
    there is room in its queue. The others end after ``seconds``.
    """
    if load == "endless":
        while True:
            yield _request(0.0, dice)
    elif load == "bursts":
        yield from _bursts(dice, seconds)
    elif load == "poisson":
        at_s = dice.expovariate(1 / POISSON_GAP_S)
        while at_s < seconds:
            yield _request(at_s, dice)
            at_s += dice.expovariate(1 / POISSON_GAP_S)
    else:
        yield from _played(dice, trace, seconds)


def _request(at_s: float, dice: random.Random) -> Arrival:
    return Arrival(at_s, dice.randint(*PROMPT_TOKENS), dice.randint(*OUTPUT_TOKENS))


def _bursts(dice: random.Random, seconds: float) -> Iterator[Arrival]:
    at_s = dice.expovariate(1 / BURST_GAP_S)
    while at_s < seconds:
        for _ in range(dice.randint(*BURST_SIZE)):
            yield _request(at_s, dice)
        at_s += dice.expovariate(1 / BURST_GAP_S)


def _played(dice: random.Random, trace: Sequence[Arrival], seconds: float) -> Iterator[Arrival]:
    """The trace from a random row on, over and over."""
    at_s = 0.0
    for gap_s, row in over_and_over(trace, dice.randrange(len(trace))):
        at_s += gap_s
        if at_s >= seconds:
            return
        yield Arrival(at_s, row.prompt_tokens, row.output_tokens)


def over_and_over(trace: Sequence[Arrival], first: int) -> Iterator[tuple[float, Arrival]]:
    """Endless: the rows from ``first`` on, each with the seconds since the one before it; none from
    the last row to the first.
    """
    for index in count(first):
        row, before = trace[index % len(trace)], trace[(index - 1) % len(trace)]
        yield max(0.0, row.at_s - before.at_s), row


def mean_gap_s(trace: Sequence[Arrival]) -> float:
    """Seconds from one arrival to the next, on average."""
    return (trace[-1].at_s - trace[0].at_s) / (len(trace) - 1)


def read_trace(path: Path | None) -> list[Arrival]:
    """The bundled slice of the Azure trace, or the first rows of a file.

    A file is a CSV with TIMESTAMP, ContextTokens and GeneratedTokens (Azure LLM inference traces)
    or JSON lines with timestamp in ms, input_length and output_length (Mooncake traces).
    Raises ConfigError where it is neither.
    """
    if path is None:
        return [Arrival(r.at_s, r.context_tokens, r.generated_tokens) for r in read_slice()]
    try:
        with path.open() as stream:
            rows = list(islice(_rows(stream, path.suffix), TRACE_ROWS))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: not a trace that can be read: {error!r}") from error
    if len(rows) < 2:
        raise ConfigError(f"{path}: a trace has at least two requests")
    return rows


def _rows(stream: Iterator[str], suffix: str) -> Iterator[Arrival]:
    if suffix == ".jsonl":
        for line in stream:
            row = json.loads(line)
            yield Arrival(
                float(row["timestamp"]) / 1000,
                int(row["input_length"]),
                int(row["output_length"]),
                tuple(row.get("hash_ids", ())),
            )
        return
    for row in csv.DictReader(stream):
        # Seven digits of a second are one more than Python reads.
        at = datetime.fromisoformat(row["TIMESTAMP"][:26]).replace(tzinfo=timezone.utc)
        yield Arrival(at.timestamp(), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
