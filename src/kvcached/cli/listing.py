"""``kvcached list`` and ``kvctl list``: what a ledger says, as a table or as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvcached import devices
from kvcached.config import Config
from kvcached.errors import LedgerError
from kvcached.ledger import Ledger
from kvcached.snapshot import AccountSnapshot, LedgerSnapshot
from kvcached.units import format_size

Device = Annotated[
    str, typer.Option(help="One device, such as host:default; all shared ones if not given.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_HEADINGS = ("charge", "in use", "cached", "warm", "demand", "guarantee", "limit", "weight", "hits")


def register(app: typer.Typer) -> None:
    """Adds the command to an app."""
    app.command(name="list")(list_accounts)


def list_accounts(device: Device = "", as_json: AsJson = False) -> None:
    """The engines that share a device, and what each of them holds.

    Examples:

      kvctl list

      kvcached list --device host:demo --json

      kvctl list --json | jq .accounts[0].charge
    """
    show(device or None, as_json)


def show(device: str | None, as_json: bool) -> None:
    """Prints one device, or all that are shared. Raises LedgerError where there is none."""
    snapshots = [snapshot(name) for name in _names(device)]
    if as_json:
        found = [as_dict(each) for each in snapshots]
        typer.echo(json.dumps(found[0] if len(found) == 1 else found, indent=2))
        return
    for each in snapshots:
        Console().print(_table(each))


def _names(device: str | None) -> list[str]:
    config = Config.from_env()
    if device or config.devices:
        chosen = (device,) if device else config.devices
        return list(dict.fromkeys(devices.find(config, name) for name in chosen))
    if not (names := devices.shared(config.directory)):
        raise LedgerError(f"{config.directory}: no device is shared here")
    return names


def snapshot(device: str) -> LedgerSnapshot:
    """A device's ledger now; takes no lock, creates nothing."""
    directory = Config.from_env().directory
    with Ledger.open(directory, device, create=False, read_only=True) as ledger:
        return ledger.snapshot()


def as_dict(found: LedgerSnapshot) -> dict[str, Any]:
    """Everything that the ledger says, and the sums."""
    return {**asdict(found), "charge": found.charge, "free": found.free}


def _table(found: LedgerSnapshot) -> Table:
    kept = {
        "headroom": found.headroom,
        "other programs": found.foreign,
        "set aside": found.set_aside,
        "free": found.free,
    }
    words = ", ".join(f"{name} {format_size(size)}" for name, size in kept.items() if size)
    table = Table(
        title=f"{found.device}: {format_size(found.capacity)} ({words})",
        title_justify="left",
    )
    table.add_column("instance")
    for heading in _HEADINGS:
        table.add_column(heading, justify="right")
    for account in found.accounts:
        table.add_row(_name(account), *_cells(account))
    return table


def _name(account: AccountSnapshot) -> str:
    if not account.alive:
        return f"{account.name} (dead)"
    if account.kept:
        return f"{account.name} (keeps {format_size(account.kept)})"
    return account.name if account.ready else f"{account.name} (starts)"


def _cells(account: AccountSnapshot) -> list[str]:
    sizes = (account.charge, account.in_use, account.cached, account.warm, account.demand)
    asked = account.hits + account.misses
    return [
        *(format_size(size) for size in (*sizes, account.guarantee)),
        "none" if account.limit is None else format_size(account.limit),
        f"{account.weight:g}",
        f"{account.hits / asked:.0%}" if asked else "",
    ]
