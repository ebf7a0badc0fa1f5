"""``kvctl delete``: accounts of the dead, and ledgers that nobody uses any more."""

from __future__ import annotations

from typing import Annotated

import typer

from kvcached import devices
from kvcached.cli.edge import one_line
from kvcached.cli.options import AsJson, Device, complete_name
from kvcached.cli.output import document
from kvcached.config import Config
from kvcached.control import open_pool
from kvcached.errors import ConfigError
from kvcached.vmm_ops import remove_ledger


def register(app: typer.Typer) -> None:
    """Adds the command to an app."""
    app.command()(delete)


def delete(
    name: Annotated[
        str,
        typer.Argument(
            help="A dead instance; all that are dead if not given.", autocompletion=complete_name
        ),
    ] = "",
    ledger: Annotated[
        bool, typer.Option("--ledger", help="The whole ledger of --device, once nobody uses it.")
    ] = False,
    device: Device = "",
    as_json: AsJson = False,
) -> None:
    """Clears the accounts of dead instances, or removes a ledger that no process has open.

    Nothing that lives is ever deleted. The memory of the dead is lendable without it: this is for
    lists that should be short, and for ledgers of an older kvcached.

    Examples:

      kvctl delete

      kvctl delete chat

      kvctl delete --ledger --device host:demo
    """
    if ledger:
        _delete_ledger(name, device, as_json)
        return
    with open_pool(device or None) as pool:
        gone = pool.delete_dead(name or None)
        where = pool.device
    if as_json:
        accounts = [{"instance": each.instance, "name": each.name} for each in gone]
        typer.echo(document("delete", {"device": where, "accounts": accounts, "ledger": False}))
    else:
        names = ", ".join(one_line(each.name) for each in gone)
        typer.echo(f"{where}: deleted {names}" if names else f"{where}: nothing is dead")


def _delete_ledger(name: str, device: str, as_json: bool) -> None:
    if name or not device:
        raise ConfigError("--ledger: expected --device and no instance, such as --device host:demo")
    config = Config.from_env()
    found = devices.find(config, device)
    remove_ledger(str(config.directory), found)
    if as_json:
        typer.echo(document("delete", {"device": found, "accounts": [], "ledger": True}))
    else:
        typer.echo(f"{found}: deleted its ledger")
