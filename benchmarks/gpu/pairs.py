#!/usr/bin/env python3
"""What kvcached costs, in pairs: engines that all live, and answer the same requests in turn.

``paced`` is below saturation: 300 requests of 512 tokens in and 128 out that arrive one by one;
the others are bursts (``workloads.BURSTS``). A p99 of 300 requests hangs on the moments in which
the CPU is slow, and on what luck a process had with its cores. So ``--engines`` plain ones and as
many with kvcached live side by side; one answers while the others have nothing to do; and the two
of a pair have the same requests right after each other, either of them first in turn. Each pair
has other requests. ``throughput.py`` gives each engine the GPU to itself, from its first burst on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fleet
import workloads
from arrivals import spread
from engine import GIB, Job
from fleet import Fleet
from sharing import worked
from throughput import paired

from kvcached.bench import pictures

SIDES = ("plain", "kvcached")
FIGURES = ("tokens_per_s", "tpot_mean_ms", "tpot_p50_ms", "tpot_p99_ms", "ttft_p99_ms")
PAUSE_S = 2.0  # an engine that has answered gives back its memory before the next one's turn
# With ``--compiled``, steps of answers are graphs, and those of a prompt or two beside them.
COMPILED = {
    "mode": 3,
    "cudagraph_mode": "FULL_AND_PIECEWISE",
    "cudagraph_capture_sizes": [1, 2, 4, *range(8, 257, 8), 512, 528, 544, 576, 1040, 1056, 1088],
}


def figure(work: str) -> str:
    """What a work is about."""
    return "tpot_p99_ms" if work == "paced" else "tokens_per_s"


@dataclass(frozen=True, slots=True)
class Schedule:
    """Who does what when. In each round every pair of engines does each work; all warm up first."""

    works: tuple[str, ...]
    engines: int
    rounds: int

    def parts(self, index: int) -> tuple[str, ...]:
        """The work of the engines with this index, in order: work 0 warms up."""
        numbers = [0, *(self._number(each, index) for each in range(self.rounds))]
        return tuple(f"{work}-{number}" for number in numbers for work in self.works)

    def turns(self) -> Iterator[tuple[str, int, str]]:
        """Side, index and work."""
        for index in range(self.engines):
            for side in SIDES:
                yield from ((side, index, f"{work}-0") for work in self.works)
        for _, index, name, sides in self.pairs():
            yield from ((side, index, name) for side in sides)

    def pairs(self) -> Iterator[tuple[str, int, str, Sequence[str]]]:
        """Work, index of the engines, the work's name with its number, and which side is first."""
        for each in range(self.rounds):
            for index in range(self.engines):
                for place, work in enumerate(self.works):
                    sides = SIDES if (each + index + place) % 2 == 0 else SIDES[::-1]
                    yield work, index, f"{work}-{self._number(each, index)}", sides

    def _number(self, each: int, index: int) -> int:
        return 1 + each * self.engines + index


def make_jobs(
    schedule: Schedule, options: argparse.Namespace, model: str, out: Path
) -> dict[tuple[str, int], Job]:
    """By side and index."""
    changes: dict[str, Any] = {"compilation": COMPILED} if options.compiled else {}

    def job(side: str, index: int) -> Job:
        name = f"{side}-{index}"
        parts = schedule.parts(index)
        return Job(
            name=name,
            model=model,
            work=parts,
            ready_file=str(out / f"ready-{name}"),
            start_files=tuple(str(out / f"start-{name}-{part}") for part in parts),
            elastic=side == "kvcached",
            ledger=str(out / "ledger"),
            runner=options.runner,
            prefix_caching=options.prefix_caching,
            max_seqs=256,
            kv_bytes=int(options.kv_gib * GIB),
            sharpen=False,
            device=options.device,
            **changes,
        )

    return {(side, index): job(side, index) for index in range(options.engines) for side in SIDES}


def play(schedule: Schedule, jobs: dict[tuple[str, int], Job], engines: Fleet) -> None:
    """As many turns as there is time for; then the engines end."""
    folder = engines.folder
    for stale in (*folder.glob("start-*"), *folder.glob("ready-*")):
        stale.unlink()
    first, *others = jobs.values()
    engines.start(first)
    # What it compiles is there for the others.
    while not Path(first.ready_file).exists() and engines.alive(first):
        time.sleep(0.1)
    for job in others:
        engines.start(job)
    for side, index, name in schedule.turns():
        job = jobs[side, index]
        part = job.work.index(name)
        time.sleep(PAUSE_S)
        Path(job.start_files[part]).touch()
        while not worked(folder, job, part + 1):
            late = time.monotonic() - fleet.STARTED > engines.deadline_s
            if late or not engines.alive(job):
                fleet.say(f"{job.name} {'is late' if late else 'has ended'} in {name}")
                engines.quiet = late  # they are well
                engines.end()
                return
            time.sleep(0.25)
        fleet.say(f"{job.name} has answered {name}")
    engines.finish()


def answers(work: dict[str, Any]) -> list[tuple[float, float]]:
    """Of each that came: milliseconds to its first token, and between tokens."""
    return [(1e3 * each[1], 1e3 * each[2]) for each in work["each"] if each is not None]


def figures(work: dict[str, Any]) -> dict[str, float]:
    """Of one engine's answers."""
    first, between = (spread(times) for times in zip(*answers(work), strict=True))
    return {f"tpot_{key}_ms": value for key, value in between.items()} | {
        "ttft_p99_ms": first["p99"],
        "tokens_per_s": work["output_tokens_per_s"],
        "answers": len(answers(work)),
        "waited_for_pages_ms": 1e3 * sum(row[1] for row in work["commands"]),
    }


def summary(results: dict[str, dict[str, Any]], schedule: Schedule) -> dict[str, Any]:
    """Of each work, the pairs in which both sides have answered, in order; their ratios; and TPOT
    of all their answers together.
    """
    told: dict[str, Any] = {}
    for wanted in schedule.works:
        pairs: list[dict[str, Any]] = []
        together: dict[str, list[float]] = {side: [] for side in SIDES}
        for work, index, name, sides in schedule.pairs():
            done = {side: results[f"{side}-{index}"]["work"].get(name) for side in SIDES}
            if work != wanted or None in done.values():
                continue
            by_side = {side: figures(one) for side, one in done.items()}
            pairs.append({"engines": index, "first": sides[0], **by_side})
            for side, one in done.items():
                together[side] += [between for _, between in answers(one)]
        if pairs:
            told[wanted] = {"pairs": pairs, **_of_plain(pairs, together)}
    return told


def _of_plain(pairs: Sequence[dict[str, Any]], together: dict[str, list[float]]) -> dict[str, Any]:
    ratios = {
        key: paired([one["kvcached"][key] for one in pairs], [one["plain"][key] for one in pairs])
        for key in FIGURES
    }
    spreads = {side: spread(values) for side, values in together.items()}
    return {"of_plain": ratios, "together_tpot_ms": spreads}


def table(works: dict[str, Any]) -> str:
    lines = [f"{'':12} {'first':9} {'plain':>10} {'kvcached':>10} {'ratio':>7}"]
    for work, told in works.items():
        for one in told["pairs"]:
            plain, ours = (one[side][figure(work)] for side in SIDES)
            lines.append(
                f"{work:12} {one['first']:9} {plain:10.2f} {ours:10.2f} {ours / plain:7.4f}"
            )
        for key, ratio in told["of_plain"].items():
            lines.append(
                f"   {key}: {ratio['median']:.4f} of plain's, median of {len(told['pairs'])} pairs"
                f" ({ratio['least']:.4f} to {ratio['most']:.4f})"
            )
        plain, ours = (told["together_tpot_ms"][side]["p99"] for side in SIDES)
        lines.append(
            f"   TPOT p99 of all answers: {plain:.3f} and {ours:.3f} ms ({ours / plain:.4f})"
        )
    return "\n".join(lines)


def main() -> int:
    parser = fleet.parser(__doc__, limit_s=540.0)
    parser.add_argument("--runner", choices=("V1", "V2"), default="V2")
    parser.add_argument(
        "--works",
        type=lambda text: text.split(","),
        default=["paced"],
        help=f"paced, {', '.join(workloads.BURSTS)}",
    )
    parser.add_argument("--engines", type=int, default=2, help="of each kind")
    parser.add_argument("--rounds", type=int, default=5, help="of all engines and works")
    parser.add_argument(
        "--kv-gib", type=float, default=8.0, help="of a plain engine; throughput needs 40"
    )
    parser.add_argument("--prefix-caching", action="store_true", help="in all engines")
    parser.add_argument("--compiled", action="store_true", help="prompts run as graphs, too")
    parser.add_argument("--device", default="gpu", help="or host:NAME, for the CPU: --shape tiny")
    parser.add_argument("--machine", default="", help="its name in the results")
    parser.add_argument("--plot", type=Path, help="a PNG to write; needs matplotlib")
    options = parser.parse_args()
    if unknown := set(options.works) - {"paced", *workloads.BURSTS}:
        parser.error(f"--works: {', '.join(sorted(unknown))} is none of them")
    out = options.out
    model = fleet.make_model(out / "models", options.shape)
    workloads.keep_within(fleet.vocabulary(options.shape))
    fleet.preload(options.device.startswith("host:"))
    schedule = Schedule(tuple(options.works), options.engines, options.rounds)
    engines = Fleet(out, options.limit)
    play(schedule, make_jobs(schedule, options, model, out), engines)
    works = summary(engines.results, schedule)
    told = {
        **fleet.heading("pairs", options.machine),
        "shape": options.shape,
        "runner": options.runner,
        "engines": options.engines,
        "prefix_caching": options.prefix_caching,
        "compiled": options.compiled,
        "figures": {work: figure(work) for work in works},
        "works": works,
        "preemptions": {
            name: result.get("preemptions") for name, result in engines.results.items()
        },
    }
    (out / "pairs.json").write_text(json.dumps(told, indent=1))
    if options.plot is not None:
        pictures.pairs(works, told["figures"], options.plot)
    print(table(works))
    return int(set(works) != set(options.works))


if __name__ == "__main__":
    sys.exit(main())
