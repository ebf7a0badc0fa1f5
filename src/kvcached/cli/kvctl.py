"""The command ``kvctl``: who may hold how much, changed while engines run.

No command needs the engines' consent or a server: settings are rows of the ledger, and engines
follow them within a moment. Commands that belong together share a file; each of them registers
itself with ``app``.
"""

from __future__ import annotations

from typing import Annotated

import typer

from kvcached.cli import reserving, settings
from kvcached.cli.edge import run
from kvcached.cli.listing import show

app = typer.Typer(
    help="Who may hold how much of a device's memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.command(name="list")
def list_accounts(
    device: Annotated[
        str, typer.Option(help="One device, such as host:default; all shared ones if not given.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The engines that share a device, and what each of them holds.

    Examples:

      kvctl list

      kvctl list --json | jq .accounts[0].charge
    """
    show(device or None, as_json)


settings.register(app)
reserving.register(app)


def main() -> None:
    """The process's edge."""
    run(app, "kvctl")


if __name__ == "__main__":
    main()
