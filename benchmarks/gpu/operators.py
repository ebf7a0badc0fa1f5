#!/usr/bin/env python3
"""The operators' tools beside real engines on a GPU: do they say what the ledger says?

Two engines with kvcached on one GPU answer requests. Meanwhile every tool is used as an operator
would: ``kvcached doctor``, ``kvctl``, ``kvtop --once``, the exporter's metrics and page. A limit is
lowered under load and set back, a guarantee is given, memory is asked back. Then both engines rest,
and every number on screen must be the ledger's; then one is killed, and the tools must say so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fleet
import workloads
from engine import Job
from fleet import Fleet

from kvcached.ledger import Ledger
from kvcached.processes import session_processes
from kvcached.units import format_size

TOOL_S = 60.0


@dataclass(slots=True)
class Checks:
    """What was looked at, and what was wrong."""

    ledger: Ledger
    folder: Path
    told: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def check(self, holds: bool, what: str) -> None:
        if not holds:
            self.problems.append(what)
            fleet.say(f"PROBLEM: {what}")

    def say(self, module: str, *arguments: str) -> str:
        """What a tool prints; how long it took is noted."""
        start = time.monotonic()
        done = subprocess.run(command(module, *arguments), capture_output=True, text=True,
                              timeout=TOOL_S)  # fmt: skip
        name = " ".join([module.partition(".")[0], *arguments])
        self.told.setdefault("seconds", {})[name] = round(time.monotonic() - start, 3)
        self.check(
            done.returncode == 0, f"{name} ended with {done.returncode}: {done.stderr[:300]}"
        )
        return done.stdout

    def ask(self, *arguments: str) -> Any:
        """The JSON document of a ``kvctl`` command."""
        return json.loads(self.say("kvctl", *arguments, "--json") or "{}")

    def soon(self, condition: Callable[[], bool], limit_s: float, what: str) -> float | None:
        """Seconds until the condition holds; a problem if it does not in time."""
        start = time.monotonic()
        while not condition():
            if time.monotonic() - start > limit_s:
                self.check(False, f"not within {limit_s:g} s: {what}")
                return None
            time.sleep(0.005)
        return round(time.monotonic() - start, 3)

    def account(self, name: str) -> Any:
        return self.ledger.snapshot().account(name)


def command(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"kvcached.cli.{module}", *arguments]


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=TOOL_S) as answer:
        text: str = answer.read().decode()
    return text


@contextlib.contextmanager
def exporter(folder: Path) -> Iterator[str]:
    """Its address."""
    log = folder / "exporter.log"
    with (
        log.open("w") as errors,
        subprocess.Popen(command("main", "exporter", "--port", "0"), stderr=errors) as process,
    ):
        try:
            end = time.monotonic() + TOOL_S
            while not (found := re.search(r"metrics on (\S+)/metrics", log.read_text())):
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"the exporter did not start: {log.read_text()}")
                time.sleep(0.02)
            yield found.group(1)
        finally:
            process.terminate()


def charges(metrics: str) -> dict[str, int]:
    found = re.findall(r"^kvcached_instance_charged_bytes\{(.*)\} (\S+)$", metrics, re.MULTILINE)
    return {re.findall(r'name="([^"]*)"', labels)[0]: int(float(value)) for labels, value in found}


def doctor(checks: Checks, on_host: bool) -> None:
    findings = json.loads(checks.say("main", "doctor", "--engine", "vllm", "--json"))["findings"]
    checks.told["doctor"] = [each for each in findings if each["check"] != "core"]
    levels = {each["check"]: each["level"] for each in findings}
    wanted = ("engine vllm", "host memory", "folder", "ledger")
    for name in wanted if on_host else (*wanted, "gpu", "gpu memory"):
        checks.check(levels.get(name) == "ok", f"doctor: {name} is {levels.get(name)}")
    checks.check("two ledgers" not in levels or levels["two ledgers"] == "note", "doctor: ledgers")


def under_load(checks: Checks, url: str, on_host: bool) -> None:
    """Every tool once, while both engines have work."""
    before = [checks.account(name).in_use for name in ("a", "b")]
    doctor(checks, on_host)
    (listed,) = checks.ask("list")["devices"]
    checks.told["list"] = {k: v for k, v in listed.items() if k != "accounts"}
    checks.check({each["name"] for each in listed["accounts"]} == {"a", "b"}, "list: not a and b")
    checks.check(listed["charge"] <= listed["capacity"], "list: more is charged than is there")
    screen = checks.say("top.command", "--once", "-n", "0.5")
    checks.told["kvtop"] = screen.splitlines()
    checks.check(len(screen.splitlines()) == 5, "kvtop: not two instances of one device")
    checks.check(set(charges(fetch(f"{url}/metrics"))) == {"a", "b"}, "metrics: not a and b")
    checks.check("<html" in fetch(f"{url}/"), "the exporter has no page")

    holds = checks.account("a").charge
    limit = max(holds // 2, 16 * checks.account("a").page_bytes)  # any one request fits
    above = checks.ask("limit", "a", str(limit))["above"]
    checks.told["limit"] = {
        "held": holds,
        "limit": limit,
        "above at first": above,
        "within_s": checks.soon(lambda: checks.account("a").charge <= limit, 60, "a's new limit"),
    }
    checks.ask("limit", "a", "none")
    guaranteed = checks.ask("guarantee", "b", "10%")
    checks.check(guaranteed["guarantee"] == listed["capacity"] // 10, "guarantee: not a tenth")
    checks.ask("guarantee", "b", "0")
    checks.ask("weight", "a", "2")
    checks.told["reclaim"] = checks.ask("reclaim", "a", str(checks.account("a").page_bytes))
    checks.told["in_use"] = [before, [checks.account(name).in_use for name in ("a", "b")]]
    checks.check(
        all(all(pair) for pair in checks.told["in_use"]), "an engine had no work meanwhile"
    )


def at_rest(checks: Checks, url: str) -> None:
    """Both engines rest, with what they have cached: all tools show the same, and it is true."""
    for _ in range(50):
        before = checks.ledger.snapshot()
        (listed,) = checks.ask("list")["devices"]
        metrics = charges(fetch(f"{url}/metrics"))
        screen = checks.say("top.command", "--once", "-n", "0.1")
        if checks.ledger.snapshot().accounts == before.accounts:
            break
    else:
        checks.check(False, "the ledger never came to rest")
    wanted = {account.name: account.charge for account in before.accounts}
    checks.told["at rest"] = {name: format_size(size) for name, size in wanted.items()}
    for name, size in wanted.items():
        (row,) = (line for line in screen.splitlines() if line.startswith(f"{name} "))
        short = format_size(size).replace(" ", "").replace("iB", "")
        checks.check(short in row, f"kvtop: {name} holds {short}, and it says {row}")
    shown = {each["name"]: each["charge"] for each in listed["accounts"]}
    checks.check(shown == wanted == metrics, f"{wanted}: list says {shown}, metrics {metrics}")
    cached = {each["name"]: each["cached"] for each in listed["accounts"]}
    checks.told["cached"] = {name: format_size(size) for name, size in cached.items()}


def after_a_kill(checks: Checks, engines: Fleet, job: Job, url: str) -> None:
    """One engine dies; what it held is free, and everybody says so."""
    held = checks.account(job.name).charge
    for pid in session_processes(engines.pid(job)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def gone() -> bool:
        checks.ledger.reap()
        return checks.account(job.name) is None

    checks.told["kill"] = {"held": held, "free_s": checks.soon(gone, 10, f"{job.name} is gone")}
    (listed,) = checks.ask("list")["devices"]
    checks.check([each["name"] for each in listed["accounts"]] == ["a"], "list: not a alone")
    checks.check(set(charges(fetch(f"{url}/metrics"))) == {"a"}, "metrics: not a alone")


def jobs(model: str, out: Path, options: argparse.Namespace) -> tuple[Job, Job]:
    on_host = options.device.startswith("host:")

    def job(name: str, work: tuple[str, ...]) -> Job:
        return Job(
            name=name,
            model=model,
            work=work,
            elastic=True,
            ledger=str(out / "ledger"),
            runner="V1" if on_host else options.runner,
            prefix_caching=True,
            max_seqs=256,
            kv_bytes=None,
            capacity_bytes=256 << 20 if on_host else None,
            sharpen=False,
            ready_file=str(out / f"ready-{name}"),
            start_files=(str(out / "start"),),
            hold_file=str(out / "end"),
            device=options.device,
        )

    return job("a", ("prefix", *("decode",) * options.rounds)), job(
        "b", ("decode", "churn") * ((options.rounds + 1) // 2)
    )


def play(checks: Checks, engines: Fleet, pair: tuple[Job, Job], on_host: bool) -> None:
    def works() -> bool:
        return all(checks.account(job.name).in_use > 0 for job in pair)

    def done() -> bool:
        paths = [engines.folder / f"{job.name}.json" for job in pair]
        return all(json.loads(path.read_text())["ok"] for path in paths)

    events = engines.folder / "events.jsonl"
    watch = command("kvctl", "watch", "-n", "0.05", "--events", "--json")
    with (
        exporter(engines.folder) as url,
        events.open("w") as lines,
        subprocess.Popen(watch, stdout=lines) as watching,
    ):
        Path(pair[0].start_files[0]).touch()
        if checks.soon(works, 60, "both engines work") is not None:
            under_load(checks, url, on_host)
        if (
            checks.soon(done, engines.deadline_s, "both engines have answered everything")
            is not None
        ):
            at_rest(checks, url)
            after_a_kill(checks, engines, pair[1], url)
        time.sleep(0.5)
        watching.send_signal(signal.SIGINT)
    seen = [json.loads(line) for line in events.read_text().splitlines()]
    kinds = sorted({(each["event"], each["name"]) for each in seen})
    checks.told["events"] = [f"{kind} {name}".strip() for kind, name in kinds]
    for wanted in ("limit a", "guarantee b", "weight a", "reclaim a"):
        checks.check(wanted in checks.told["events"], f"events: no {wanted}")
    ends = {"died b", "reaped b"} & set(checks.told["events"])
    checks.check(bool(ends), "events: b's death is not among them")


def main() -> int:
    parser = fleet.parser(__doc__, shape="1b", limit_s=300.0)
    parser.add_argument("--runner", choices=("V1", "V2"), default="V2")
    parser.add_argument("--rounds", type=int, default=4, help="how long they have work")
    parser.add_argument("--device", default="gpu", help="or host:NAME, for the CPU: --shape tiny")
    options = parser.parse_args()
    out = options.out
    on_host = options.device.startswith("host:")
    model = fleet.make_model(out / "models", options.shape)
    workloads.keep_within(fleet.vocabulary(options.shape))
    fleet.preload(on_host)
    device = options.device if on_host else fleet.gpu_uuid()
    os.environ |= {"KVCACHED_DIR": str(out / "ledger"), "KVCACHED_DEVICE": device}
    engines, pair = Fleet(out, options.limit), jobs(model, out, options)
    for path in {p for job in pair for p in (job.ready_file, *job.start_files, job.hold_file)}:
        Path(path).unlink(missing_ok=True)
    try:
        for job in pair:
            engines.start(job)
        for job in pair:
            while not Path(job.ready_file).exists():
                if not engines.alive(job):
                    raise SystemExit(f"{job.name} did not start: see {out}/{job.name}.log")
                time.sleep(0.05)
        engines.quiet = True  # one of them is killed on purpose
        with Ledger.open(out / "ledger", device, create=False) as ledger:
            checks = Checks(ledger, out)
            play(checks, engines, pair, on_host)
    finally:
        engines.end()
    told = {"device": device, "problems": checks.problems, **checks.told}
    (out / "operators.json").write_text(json.dumps(told, indent=1))
    print(json.dumps(told, indent=1))
    return 1 if checks.problems else 0


if __name__ == "__main__":
    sys.exit(main())
