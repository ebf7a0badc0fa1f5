"""``kvcached bench fragmentation``: memory that is mapped but holds nothing, after a day of churn.

Time and the engine are simulated (``bench.churn``); ledger, page pool and block allocator are those
of a real deployment, with the blocks of an 8B model. The figure is what is mapped over what is in
use or cached, both in bytes, sampled all day: pages that are only partly used, warm pages, and the
page of block 0 are what is above 1. Deterministic for a seed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvcached.bench.churn import BLOCK_BYTES, STEP_S, Churn, Load
from kvcached.bench.compaction import Compactor
from kvcached.bench.share_load import Arrival, read_trace
from kvcached.ledger import Ledger
from kvcached.units import GIB, MIB, round_up

SAMPLE_STEPS = 100
COMPACT_STEPS = 100
CAPACITY_BYTES = 160 * GIB
"""More than a GPU has: memory is never short where nothing is cached."""
MODES = {
    "steady": "always so many",
    "day": "arrivals of a day",
    "compacted": "of a day, compacted",
    "cached": "of a day, prefix cache",
}


@dataclass(slots=True)
class Record:
    """Samples of one run. Sizes in blocks, except where they are pages."""

    mapped: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)  # in use or cached
    used: list[int] = field(default_factory=list)
    warm_pages: list[int] = field(default_factory=list)
    busy_pages: list[int] = field(default_factory=list)  # with blocks in use
    at_once: list[int] = field(default_factory=list)

    def take(self, engine: Churn) -> None:
        blocks = engine.pool.blocks
        self.mapped.append(blocks.present_pages * blocks.blocks_per_page)
        self.held.append(max(1, blocks.used_blocks + blocks.cached_blocks))
        self.used.append(max(1, blocks.used_blocks))
        self.warm_pages.append(blocks.empty_pages)
        self.busy_pages.append(blocks.present_pages - blocks.empty_pages - blocks.idle_pages)
        self.at_once.append(engine.at_once)

    def ratios(self) -> list[float]:
        return [mapped / held for mapped, held in zip(self.mapped, self.held, strict=True)]


def run(
    at_once: Sequence[int],
    pages_mib: Sequence[int],
    *,
    hours: float = 24.0,
    seed: int = 1,
    modes: Sequence[str] = tuple(MODES),
    trace: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Every combination of requests at once, page size and mode, in a run of its own."""
    rows = read_trace(trace)
    result: dict[str, Any] = {
        "benchmark": "fragmentation",
        "trace": trace.name if trace is not None else "bundled slice",
        "hours": hours,
        "seed": seed,
        "block_bytes": BLOCK_BYTES,
        "runs": [],
    }
    for count in at_once:
        for page_mib in pages_mib:
            for mode in modes:
                figures = play(rows, count, page_mib, mode, hours=hours, seed=seed)
                result["runs"].append(figures)
                progress(
                    f"{count} at once, pages of {page_mib} MiB, {MODES[mode]}: "
                    f"{figures['ratio']['of_sums']:.3f}"
                )
    return result


def play(
    rows: Sequence[Arrival], at_once: int, page_mib: int, mode: str, *, hours: float, seed: int
) -> dict[str, Any]:
    """One run of so many simulated hours."""
    page = page_mib * MIB
    capacity = round_up(_needed(rows, at_once), page) if mode == "cached" else CAPACITY_BYTES
    record = Record()
    with (
        tempfile.TemporaryDirectory(prefix="kvcached-churn-") as folder,
        Ledger.open(Path(folder) / "ledger", "host:churn", capacity) as ledger,
    ):
        load = Load(at_once, steady=mode == "steady", seed=seed)
        engine = Churn(ledger, load, rows, page // BLOCK_BYTES, cached=mode == "cached")
        compactor = Compactor(engine) if mode == "compacted" else None
        for step in range(1, round(hours * 3600 / STEP_S) + 1):
            engine.step()
            if compactor is not None and step % COMPACT_STEPS == 0:
                compactor.work()
            if step % SAMPLE_STEPS == 0:
                record.take(engine)
        engine.pool.check()
        figures = {"at_once": at_once, "page_mib": page_mib, "mode": mode, "hours": hours}
        figures |= _figures(record, engine, hours)
        if compactor is not None:
            figures["moved_mib_per_s"] = round(compactor.moved * BLOCK_BYTES / MIB / engine.now, 2)
        engine.close()
    return figures


def _needed(rows: Sequence[Arrival], at_once: int) -> int:
    """Three times what so many requests hold on average: a cache fills what they leave."""
    tokens = sum(row.prompt_tokens + row.output_tokens for row in rows) / len(rows)
    return round(3 * at_once * tokens / 16 * BLOCK_BYTES)


def _figures(record: Record, engine: Churn, hours: float) -> dict[str, Any]:
    ratios = record.ratios()
    per_page = engine.pool.blocks.blocks_per_page
    busy = [
        pages * per_page / used for pages, used in zip(record.busy_pages, record.used, strict=True)
    ]
    hour = max(1, len(ratios) // max(1, round(hours)))
    ordered = sorted(ratios)
    held = sum(record.held)
    return {
        "ratio": {
            "of_sums": round(sum(record.mapped) / held, 4),
            "p50": round(ordered[len(ordered) // 2], 4),
            "p99": round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 4),
            "end": round(ratios[-1], 4),
            "first_hour": round(sum(ratios[:hour]) / hour, 4),
            "last_hour": round(sum(ratios[-hour:]) / hour, 4),
        },
        # What is above 1, of what is held: whole warm pages, and holes in the others.
        "warm_part": round(sum(record.warm_pages) * per_page / held, 4),
        "holes_part": round((sum(record.mapped) - sum(record.warm_pages) * per_page) / held - 1, 4),
        "busy_pages_ratio": round(sum(busy) / len(busy), 4),
        "mean_at_once": round(sum(record.at_once) / len(record.at_once), 1),
        "mean_held_gib": round(held / len(ratios) * BLOCK_BYTES / GIB, 2),
        "finished": engine.finished,
        "refused": engine.refused,
        "pages_mapped_per_s": round(engine.mapped_pages / engine.now, 3),
    }
