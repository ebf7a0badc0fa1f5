"""``kvcached bench hits``: what a prefix cache without a cap answers, beside one with.

Two instances play a conversation trace whose rows name the prefixes of their prompts (Mooncake's).
Each conversation belongs to one of them, and they work in turns: in each period the requests of
the first arrive in its first half, those of the second in its second half. Time and engines are
simulated; ledger, policy, page pools and allocators are real. Deterministic for a seed.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvcached.bench.hits_engine import (
    BLOCK_BYTES,
    BLOCK_TOKENS,
    PAGE_BYTES,
    CachingEngine,
    Prompt,
)
from kvcached.errors import ConfigError
from kvcached.ledger import Ledger
from kvcached.units import round_up

STEP_S = 0.05
PERIOD_S = 120.0
CAP_TOKENS = 16_000
"""The cap of the reference implementation's prefix cache."""
MODES = {
    "reclaim": "no cap, reclaim",
    "capped": f"cap of {CAP_TOKENS} tokens each",
    "halves": "no cap, halves of their own",
}


def read_prompts(path: Path, rows: int | None = None) -> list[Prompt]:
    """The first rows of a trace of Mooncake's form. Raises ConfigError where it is none."""
    prompts = []
    try:
        with path.open() as stream:
            for line in stream:
                row = json.loads(line)
                prompts.append(
                    Prompt(
                        float(row["timestamp"]) / 1000,
                        int(row["input_length"]),
                        int(row["output_length"]),
                        tuple(row["hash_ids"]),
                    )
                )
                if len(prompts) == rows:
                    break
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: not a trace with hashes of prefixes: {error!r}") from error
    if len(prompts) < 2:
        raise ConfigError(f"{path}: a trace has at least two requests")
    return prompts


def split(prompts: Sequence[Prompt], seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Each conversation to one of two instances, which have their bursts in turns."""
    dice = random.Random(seed)
    whose: dict[int, int] = {}
    parts: tuple[list[Prompt], list[Prompt]] = ([], [])
    for prompt in prompts:
        # All prompts begin with the same block; the second tells the conversation.
        root = prompt.hashes[min(1, len(prompt.hashes) - 1)]
        who = whose.setdefault(root, dice.randrange(2))
        begin = prompt.at_s // PERIOD_S * PERIOD_S
        at_s = begin + who * PERIOD_S / 2 + (prompt.at_s - begin) / 2
        parts[who].append(replace(prompt, at_s=at_s))
    return parts


def most_hits(parts: Sequence[Sequence[Prompt]]) -> float:
    """The hit rate of caches that never lose anything."""
    hits = tokens = 0
    for prompts in parts:
        seen: set[int] = set()
        for prompt in prompts:
            digests = prompt.hashes[: prompt.whole]
            hits += next((i for i, d in enumerate(digests) if d not in seen), len(digests))
            tokens += prompt.tokens
            seen.update(digests)
    return hits * BLOCK_TOKENS / tokens


def run(
    trace: Path,
    pools: Sequence[int],
    *,
    rows: int | None = None,
    seed: int = 1,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Plays the trace once for each pool (in tokens) and each of ``MODES``. Rates are of prompt
    tokens. Raises ConfigError for a trace that cannot be read or a pool that is too small for it.
    """
    prompts = read_prompts(trace, rows)
    parts = split(prompts, seed)
    largest = max(prompt.blocks for prompt in prompts) * BLOCK_TOKENS
    for tokens in pools:
        if tokens < 4 * largest:
            raise ConfigError(f"a pool of {tokens} tokens: expected {4 * largest} or more")
    result: dict[str, Any] = {
        "trace": trace.name,
        "requests": len(prompts),
        "prompt_tokens": sum(prompt.tokens for prompt in prompts),
        "seed": seed,
        "cap_tokens": CAP_TOKENS,
        "most_hits": round(most_hits(parts), 4),
        "pools": [],
    }
    for tokens in pools:
        figures: dict[str, Any] = {"tokens": tokens}
        for mode in MODES:
            progress(f"{tokens} tokens, {MODES[mode]}")
            figures[mode] = play(parts, tokens, mode)
        result["pools"].append(figures)
    return result


def play(parts: Sequence[Sequence[Prompt]], tokens: int, mode: str) -> dict[str, Any]:
    """One run of both instances on a pool of so many tokens."""
    capacity = round_up(tokens * BLOCK_BYTES // BLOCK_TOKENS, PAGE_BYTES)
    cap = CAP_TOKENS // BLOCK_TOKENS if mode == "capped" else None
    with (
        tempfile.TemporaryDirectory(prefix="kvcached-hits-") as folder,
        Ledger.open(Path(folder) / "ledger", "host:hits", capacity) as ledger,
    ):
        engines = [
            CachingEngine(ledger, name, part, cap) for name, part in zip("ab", parts, strict=True)
        ]
        if mode == "halves":
            for engine in engines:
                ledger.set_limit(engine.name, capacity // 2)
        step = 0
        while not all(engine.done for engine in engines):
            step += 1
            for engine in engines if step % 2 else engines[::-1]:
                if engine.due(step * STEP_S):
                    engine.step(step * STEP_S)
        figures = _figures(engines, ledger, step * STEP_S)
        for engine in engines:
            engine.close()
    return figures


def _figures(engines: Sequence[CachingEngine], ledger: Ledger, seconds: float) -> dict[str, Any]:
    snapshot = ledger.snapshot()
    waits = sorted(wait for engine in engines for wait in engine.waits_s)
    hits = sum(engine.hit_tokens for engine in engines)
    tokens = sum(engine.prompt_tokens for engine in engines)
    return {
        "hit_rate": round(hits / tokens, 4),
        "hit_rates": [round(e.hit_tokens / max(1, e.prompt_tokens), 4) for e in engines],
        "wait_p50_s": round(waits[len(waits) // 2], 2),
        "wait_p99_s": round(waits[min(len(waits) - 1, int(len(waits) * 0.99))], 2),
        "evictions": sum(account.evictions for account in snapshot.accounts),
        "evictions_by_pressure": sum(a.evictions_by_pressure for a in snapshot.accounts),
        "high_water_part": round(snapshot.high_water / snapshot.capacity, 4),
        "seconds": round(seconds, 1),
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """Writes the picture: hit rate by size of the pool. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"reclaim": "#3f8f6b", "capped": "#b3261e", "halves": "#2f6f9f"}
    sizes = [pool["tokens"] / 1e6 for pool in result["pools"]]
    with pyplot.rc_context({"font.size": 10}):
        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        for mode, words in MODES.items():
            rates = [100 * pool[mode]["hit_rate"] for pool in result["pools"]]
            axes.plot(sizes, rates, marker="o", color=colours[mode], label=words)
        axes.axhline(
            100 * result["most_hits"], color="#999", linestyle="--", label="nothing is ever lost"
        )
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("memory that both share, millions of tokens")
        axes.set_ylabel("prompt tokens answered from the cache, %")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        figure.savefig(path, dpi=130)
        pyplot.close(figure)
