#!/usr/bin/env python3
"""vLLM's sleep mode beside a neighbour: who has the memory meanwhile, and what waking takes.

Two engines with kvcached and sleep mode on one GPU, A and B, of the same shape. A is asked, sleeps,
wakes and is asked the same again, several times: with room for its weights, while B holds all
memory as cached prefixes (level 1 and level 2), at the same time as B, and while a hold keeps the
memory, which must fail. Its answers must be the same each time. Afterwards its process is ended and
started again, for comparison. Level 2 drops the weights; these have no checkpoint and are made anew
on the GPU, which stands for reading them.

With ``--http`` an engine behind ``vllm serve`` sleeps and wakes instead, by /sleep and /wake_up.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fleet
from engine import GIB, Job
from fleet import Fleet
from sharing import Watch, until

from kvcached import nvml
from kvcached.holds import Hold
from kvcached.ledger import Ledger

TIMEOUT_S = 8.0  # KVCACHED_MAP_TIMEOUT: what waking may wait
# Of A and of B, in the order of the play.
WORK_A = (
    *("ask-first", "sleep1-room", "wake-room", "ask-room"),
    *("sleep1-full", "wake-full", "ask-full"),
    *("sleep2-full", "wakeanew-full", "ask-anew"),
    *("sleep1-held", "wakerefused-held", "wake-held", "ask-held"),
    *("sleep1-both", "wake-both", "ask-both"),
)
WORK_B = (
    *("ask-first", "flood-beside", "flood-more", "flood-again"),
    *("sleep1-both", "wake-both", "ask-both"),
)


def jobs(model: str, out: Path, runner: str) -> tuple[Job, Job, Job]:
    """A, B, and A once more."""

    def job(name: str, work: tuple[str, ...]) -> Job:
        return Job(
            name=name,
            model=model,
            work=work,
            elastic=True,
            ledger=str(out / "ledger"),
            runner=runner,
            # B's cache is what fills the GPU; A's answers are to be computed each time
            prefix_caching=name == "b",
            kv_bytes=None,
            sleep_mode=True,
            map_timeout_s=TIMEOUT_S,
            ready_file=str(out / f"ready-{name}"),
            start_files=tuple(str(out / f"start-{name}-{each}") for each in work),
        )

    a, b = job("a", WORK_A), replace(job("b", WORK_B), hold_file=str(out / "end-b"))
    return a, b, job("again", ("ask-first",))


@dataclass(slots=True)
class Stage:
    """Engines, and what is known of how far they are."""

    engines: Fleet
    watch: Watch
    ledger_folder: Path
    uuid: str

    def start(self, *started: Job) -> None:
        for job in started:
            for path in (job.ready_file, *job.start_files, job.hold_file):
                if path:
                    Path(path).unlink(missing_ok=True)
            self.engines.start(job)
        for job in started:
            self._until(job, Path(job.ready_file).exists)

    def begin(self, job: Job, work: str) -> None:
        Path(job.start_files[job.work.index(work)]).touch()

    def finish(self, job: Job, work: str) -> dict[str, Any]:
        self._until(job, lambda: work in self._done(job))
        told: dict[str, Any] = self._done(job)[work]
        fleet.say(f"{job.name} {work}: {short(told)}")
        return told

    def do(self, job: Job, work: str) -> dict[str, Any]:
        self.begin(job, work)
        return self.finish(job, work)

    def _done(self, job: Job) -> dict[str, Any]:
        path = self.engines.folder / f"{job.name}.json"
        done: dict[str, Any] = json.loads(path.read_text())["work"] if path.exists() else {}
        return done

    def _until(self, job: Job, condition: Any) -> None:
        until(condition, self.watch, self.engines, job, limit_s=120.0)

    def hold_all(self) -> Hold:
        """Keeps everything that engines do not need, but for one GiB: less than any weights."""
        with Ledger.open(self.ledger_folder, self.uuid, create=False, read_only=True) as ledger:
            now = ledger.snapshot()
        sure = sum(max(account.guarantee, account.pinned) for account in now.accounts)
        return Hold(now.capacity - now.headroom - now.foreign - sure - GIB, self.uuid)


def short(told: dict[str, Any]) -> str:
    return json.dumps(
        {k: round(v, 2) if isinstance(v, float) else v for k, v in told.items() if k != "tokens"}
    )


def play(stage: Stage, a: Job, b: Job, again: Job) -> dict[str, Any]:
    told: dict[str, Any] = {}
    stage.start(a, b)
    first = stage.do(a, "ask-first")
    first_b = stage.do(b, "ask-first")
    told["sleep, first"] = stage.do(a, "sleep1-room")
    told["wake, room"] = stage.do(a, "wake-room")
    told["asked, room"] = stage.do(a, "ask-room")
    told["B fills, A awake"] = stage.do(b, "flood-beside")
    told["sleep, B full"] = stage.do(a, "sleep1-full")
    told["B fills, A asleep"] = stage.do(b, "flood-more")
    told["wake, B full"] = stage.do(a, "wake-full")
    told["asked, B full"] = stage.do(a, "ask-full")
    told["sleep 2, B full"] = stage.do(a, "sleep2-full")
    stage.do(b, "flood-again")
    told["wake 2, B full"] = stage.do(a, "wakeanew-full")
    told["asked, anew"] = stage.do(a, "ask-anew")
    stage.do(a, "sleep1-held")
    with stage.hold_all() as hold:
        told["held"] = hold.wait(10.0)
        told["wake, refused"] = stage.do(a, "wakerefused-held")
    told["wake, after that"] = stage.do(a, "wake-held")
    told["asked, after that"] = stage.do(a, "ask-held")
    for job in (a, b):
        stage.do(job, "sleep1-both")
    for job in (a, b):
        stage.begin(job, "wake-both")
    told["wake, both: A"] = stage.finish(a, "wake-both")
    told["wake, both: B"] = stage.finish(b, "wake-both")
    told["asked, both"] = stage.do(a, "ask-both")
    same_b = stage.do(b, "ask-both")["tokens"] == first_b["tokens"]
    answers = [told[each]["tokens"] for each in told if each.startswith("asked")]
    told["same"] = [answer == first["tokens"] for answer in answers] + [same_b]
    told["first"] = first
    while stage.engines.alive(a):
        time.sleep(0.05)
    begun = time.monotonic()
    stage.start(again)
    told["started again"] = {"seconds": time.monotonic() - begun}
    told["same"].append(stage.do(again, "ask-first")["tokens"] == first["tokens"])
    Path(b.hold_file).touch()
    stage.engines.finish(stage.watch.tick)
    return told


def problems(told: dict[str, Any]) -> list[str]:
    """What is not as it must be."""
    found = []
    if not all(told["same"]):
        found.append(f"answers differ: {told['same']}")
    for name, one in told.items():
        if name.startswith("sleep") and not one["asleep"]:
            found.append(f"{name}: it says that it is awake")
        if name.startswith("wake") and one["asleep"] != (name == "wake, refused"):
            found.append(f"{name}: asleep is {one['asleep']}")
    said = told["wake, refused"]["said"]
    if not (told["held"] and "did not come free" in said and "are free" in said):
        found.append(f"a wake without room: held {told['held']}, it says {said!r}")
    grew = told["B fills, A asleep"]["kv_b_gib"] - told["B fills, A awake"]["kv_b_gib"]
    if grew < 0.8 * told["sleep, B full"]["freed_gib"]:
        found.append(f"B grew by {grew:.1f} GiB only while A slept")
    return found


def table(told: dict[str, Any], import_s: float) -> str:
    lines = [f"{'':20} {'seconds':>8}"]
    for name, one in told.items():
        if not (isinstance(one, dict) and "seconds" in one) or name in ("first", "B fills"):
            continue
        notes = []
        if "freed_gib" in one:
            notes.append(f"freed {one['freed_gib']:.1f} GiB")
        if "ttft_s" in one:
            notes.append(f"TTFT p50 {one['ttft_s']:.2f} s (first: {told['first']['ttft_s']:.2f})")
        if "made_s" in one:
            notes.append(f"memory {one['mapped_s']:.2f} s, weights made {one['made_s']:.2f} s")
        if "batches" in one:
            notes.append(f"KV of B {one['kv_b_gib']:.1f} GiB, free {one['free_gib']:.1f}")
        if "before" in one:
            notes.append(
                f"before: KV of B {one['before']['kv_b_gib']:.1f} GiB, "
                f"free {one['before']['free_gib']:.1f}"
            )
        if name == "started again":
            notes.append(f"without the imports' {import_s:.0f} s")
        lines.append(f"{name:20} {one['seconds']:8.2f}  {'; '.join(notes)}")
    lines.append(f"refused: {told['wake, refused']['said']}")
    lines.append(f"answers the same: {told['same']}")
    return "\n".join(lines)


def main() -> int:
    parser = fleet.parser(__doc__, limit_s=300.0)
    parser.add_argument("--runner", choices=("V1", "V2"), default="V2")
    parser.add_argument("--http", action="store_true", help="one engine behind `vllm serve`")
    options = parser.parse_args()
    out = options.out
    model = fleet.make_model(out / "models", options.shape)
    if options.http:
        import sleep_http

        return sleep_http.run(model, out, options.runner)
    os.environ["KVCACHED_DIR"] = str(out / "ledger")  # for the hold
    begun = time.monotonic()
    fleet.preload()
    import_s = time.monotonic() - begun
    uuid = fleet.gpu_uuid()
    stage = Stage(Fleet(out, options.limit), Watch(nvml.Gpu(uuid)), out / "ledger", uuid)
    told = play(stage, *jobs(model, out, options.runner))
    found = problems(told)
    kept = {
        name: {k: v for k, v in one.items() if k != "tokens"} if isinstance(one, dict) else one
        for name, one in told.items()
    }
    figures = {"runner": options.runner, "import_s": import_s, "problems": found, **kept}
    (out / "sleep.json").write_text(json.dumps(figures, indent=1))
    print(table(told, import_s))
    for problem in found:
        print(f"PROBLEM: {problem}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
