#!/usr/bin/env python3
"""The sweep of ``multi_llm.py`` on a machine with several GPUs, within one limit of time.

Each part is a table of its own: a trace or a fixed shape, and the heights of the peaks. The sides
of a part play the same requests, each on a GPU that it has to itself: a GPU that is free takes what
is next in the list, so that neighbours mostly play at the same time. The first matter most: what no
time is left for is skipped, and named. vLLM is imported once for each GPU, and each side of a part
is a fork.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import fleet
import multi_llm
from fleet import say

SPAN = "--width 8 --give-up 12"
PARTS = {
    "azure": f"{SPAN} --rates 20,24,28,16",
    "reference": f"{SPAN} --rates 60,40,80 --fixed 256,256 --no-prefix-caching",
    "mooncake": f"{SPAN} --rates 12,10 --divisor 4 --answer-divisor 1 --shapes 8b,1b,8b",
    "uncached": f"{SPAN} --rates 20,24 --no-prefix-caching",
    "again": f"{SPAN} --rates 24 --seed 2",
}
"""Options of ``multi_llm.py`` for each part."""
PLAY = (
    "azure:static",
    "azure:elastic",
    "reference:elastic",
    "reference:static",
    "mooncake:static",
    "mooncake:elastic",
    "azure:swap",
    "again:elastic",
    "again:static",
)
LEAST_S = 65.0
"""Nothing is begun when less time is left: engines start in 15 s, and a point takes 35 s."""


def numbers(path: Path) -> Iterator[int]:
    """0, 1, 2 and so on, each to one of the processes that share the file."""
    with path.open("a+") as shared:
        while True:
            fcntl.flock(shared, fcntl.LOCK_EX)
            shared.seek(0)
            number = len(shared.read())
            shared.write(".")
            shared.flush()
            fcntl.flock(shared, fcntl.LOCK_UN)
            yield number


def play_lane(options: argparse.Namespace) -> int:
    """One GPU's share of it: whatever is next."""
    fleet.preload(options.device.startswith("host:"))
    failed = 0
    for number in numbers(options.out / "next"):
        if number >= len(options.play):
            break
        part, _, side = options.play[number].partition(":")
        left_s = options.until - time.monotonic()
        if left_s < LEAST_S:
            say(f"{part}, {side}: not begun, {left_s:.0f} s are left")
            continue
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            fleet.STARTED = time.monotonic()  # its limit is its own
            sys.argv = ["multi_llm.py", *arguments(options, part, side, left_s)]
            os._exit(_run(multi_llm.main))
        failed += os.waitpid(pid, 0)[1] != 0
    return int(failed > 0)


def arguments(options: argparse.Namespace, part: str, side: str, limit_s: float) -> list[str]:
    """``multi_llm.py``'s, for one side of a part; what the caller adds counts last."""
    trace = ["--trace", str(options.mooncake)] if part == "mooncake" else []
    return [
        *("--out", str(options.out / f"{part}-{side}"), "--sides", side),
        *("--limit", f"{limit_s:.0f}", "--device", options.device, "--machine", options.machine),
        *PARTS[part].split(),
        *trace,
        *shlex.split(options.also),
    ]


def _run(main: Callable[[], int]) -> int:
    """The edge of a forked process."""
    try:
        return main()
    except BaseException:  # noqa: BLE001 - it reports, and ends
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def main() -> int:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.lane is not None:
        return play_lane(options)
    (options.out / "next").unlink(missing_ok=True)
    until = str(time.monotonic() + options.limit)
    lanes_ = []
    for lane, gpu in enumerate(options.gpus):
        command = [sys.executable, *sys.argv, "--lane", str(lane), "--until", until]
        log = (options.out / f"lane-{lane}.log").open("w")
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
        lanes_.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
    codes = [lane.wait() for lane in lanes_]
    failed = any(codes)
    for lane in range(len(options.gpus)):
        print(f"--- GPU {options.gpus[lane]}\n{(options.out / f'lane-{lane}.log').read_text()}")
    for part in dict.fromkeys(each.partition(":")[0] for each in options.play):
        found = sorted(options.out.glob(f"{part}-*/multi_llm.json"))
        if found:
            print(f"\n=== {part}")
            failed |= multi_llm.merge(options.out / part, found) != 0
            (options.out / part / "multi_llm.json").rename(options.out / f"{part}.json")
    return int(failed)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results and logs")
    parser.add_argument(
        "--play",
        type=lambda text: text.split(","),
        default=list(PLAY),
        help=f"part:side, in order; parts are {', '.join(PARTS)}",
    )
    parser.add_argument("--gpus", type=lambda text: text.split(","), default=["0", "1"])
    parser.add_argument("--mooncake", type=Path, help="Mooncake's conversation trace")
    parser.add_argument("--also", default="", help="more options for multi_llm.py, in one word")
    parser.add_argument("--device", default="gpu", help="as multi_llm.py's")
    parser.add_argument("--machine", default="", help="its name in the results")
    parser.add_argument("--limit", type=float, default=500.0, help="seconds in all")
    parser.add_argument("--lane", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
