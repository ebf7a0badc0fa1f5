"""``kvctl list``: what the ledgers say, as a table or as JSON.

It answers within a tenth of a second, start-up included, so nothing here may import typer, rich or
an engine: ``parse`` reads the command's own few words, and leaves all others to typer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from kvcached import devices
from kvcached.cli.edge import FAILED, complain, one_line
from kvcached.cli.output import columns, document, ledger_fields
from kvcached.config import Config
from kvcached.errors import LedgerError
from kvcached.observe import Observer
from kvcached.snapshot import AccountSnapshot, LedgerSnapshot
from kvcached.units import format_size

_HEADINGS = ("charge", "in use", "cached", "warm", "demand", "guarantee", "limit", "weight", "hits")


def parse(words: Sequence[str]) -> tuple[str, bool] | None:
    """The device (empty: all) and whether JSON is wanted, where this is ``list`` with nothing but
    its own options; None where typer should have a look.
    """
    if not words or words[0] != "list":
        return None
    device, as_json = "", False
    rest = iter(words[1:])
    for word in rest:
        if word == "--json":
            as_json = True
        elif word == "--device":
            device = next(rest, "-")
            if device.startswith("-"):
                return None
        elif word.startswith("--device="):
            device = word.removeprefix("--device=")
        else:
            return None
    return device, as_json


def show(device: str, as_json: bool, program: str) -> int:
    """Prints one device, or all that are shared; returns the exit code.

    A ledger that cannot be read is named on stderr, as the ``program`` says it, beside those that
    can. Raises LedgerError where there is none to show.
    """
    with observer(device) as looks:
        found = looks.read()
        problems = looks.problems
    if not found:
        raise LedgerError("; ".join(problems.values()) or f"{looks.directory}: {NOTHING}")
    for problem in problems.values():
        complain(program, problem)
    if as_json:
        print(document("list", {"devices": [ledger_fields(each) for each in found]}, indent=2))
    else:
        sys.stdout.write("".join(f"{line}\n" for each in found for line in table(each)))
    return FAILED if problems else 0


NOTHING = "no device is shared here"


def observer(device: str = "") -> Observer:
    """Looks at a device, or at those of ``KVCACHED_DEVICE``, or at all that are shared."""
    config = Config.from_env()
    chosen = (device,) if device else config.devices
    return Observer(config.directory, tuple({devices.find(config, name): 0 for name in chosen}))


def table(found: LedgerSnapshot) -> Iterator[str]:
    """The lines of one device."""
    kept = {
        "headroom": found.headroom,
        "other programs": found.foreign,
        "set aside": found.set_aside,
        "free": found.free,
    }
    words = ", ".join(f"{name} {format_size(size)}" for name, size in kept.items() if size)
    capacity = format_size(found.capacity)
    yield f"{found.device}: {capacity} ({words})" if words else f"{found.device}: {capacity}"
    rows = [("instance", *_HEADINGS), *((label(a), *_cells(a)) for a in found.accounts)]
    yield from columns(rows)


def label(account: AccountSnapshot) -> str:
    """An instance's name and what is to say about its state."""
    name = one_line(account.name)
    if not account.alive:
        return f"{name} (dead)"
    if account.kept:
        return f"{name} (keeps {format_size(account.kept)})"
    if account.asleep:
        return f"{name} (asleep)"
    return name if account.ready else f"{name} (starts)"


def _cells(account: AccountSnapshot) -> list[str]:
    sizes = (account.charge, account.in_use, account.cached, account.warm, account.demand)
    asked = account.hits + account.misses
    return [
        *(format_size(size) for size in (*sizes, account.guarantee)),
        "none" if account.limit is None else format_size(account.limit),
        f"{account.weight:g}",
        f"{account.hits / asked:.0%}" if asked else "",
    ]
