#!/usr/bin/env python3
"""Writes down, twice a second until it is ended, what every instance's KV cache holds on every
device, as the ledgers say; ``--show`` prints such a file as a table.
"""

from __future__ import annotations

import argparse
import csv
import signal
import sys
import time
from pathlib import Path

from kvcached.config import Config
from kvcached.devices import shared
from kvcached.errors import KvcachedError
from kvcached.ledger import Ledger
from kvcached.units import format_size

EVERY_S = 0.5
LINES = 24  # of the table
FIELDS = ("at_s", "device", "instance", "charge", "in_use", "cached", "warm", "capacity")


def watch(path: Path) -> None:
    config, start = Config.from_env(), time.monotonic()
    with path.open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(FIELDS)
        while True:
            at_s = f"{time.monotonic() - start:.1f}"
            for device in shared(config.directory):
                try:
                    with Ledger.open(
                        config.directory, device, create=False, read_only=True
                    ) as ledger:
                        seen = ledger.snapshot()
                except KvcachedError:
                    continue  # it was removed meanwhile
                for each in seen.accounts:
                    held = (each.charge, each.in_use, each.cached, each.warm)
                    rows.writerow((at_s, device, each.name, *held, seen.capacity))
            stream.flush()
            time.sleep(EVERY_S)


def show(path: Path) -> None:
    with path.open() as stream:
        rows = list(csv.DictReader(stream))
    if not rows:
        print("no instance with kvcached was seen: the server was plain, or uses another folder")
        return
    names = sorted({(row["device"], row["instance"]) for row in rows})
    for device, name in names:
        own = [row for row in rows if (row["device"], row["instance"]) == (device, name)]
        most = max(own, key=lambda row: int(row["charge"]))
        capacity = format_size(int(most["capacity"]))
        print(f"KV cache of {name} on {device} ({capacity}): most {size(most, 'charge')}")
        if len({row["charge"] for row in own}) == 1:
            continue  # it had nothing to do
        print("   at s     held   in use   cached     warm")
        step = max(1, -(-len(own) // LINES))
        for row in own[::step]:
            columns = "".join(f"{size(row, key):>9}" for key in FIELDS[3:7])
            print(f"{row['at_s']:>7}{columns}")


def size(row: dict[str, str], key: str) -> str:
    return f"{int(row[key]) / 2**20:.1f}M"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="write to this file until ended")
    what.add_argument("--show", type=Path, help="print this file")
    options = parser.parse_args()
    if options.show:
        show(options.show)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    watch(options.out)


if __name__ == "__main__":
    main()
