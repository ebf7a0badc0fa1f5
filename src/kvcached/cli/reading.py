"""``kvctl list`` and ``watch`` as typer shows them: commands that change nothing."""

from __future__ import annotations

from typing import Annotated

import typer

from kvcached.cli.options import AsJson, complete_device

Device = Annotated[
    str,
    typer.Option(
        help="One device, such as host:default; all shared ones if not given.",
        autocompletion=complete_device,
    ),
]


def register(app: typer.Typer) -> None:
    """Adds ``list`` to an app."""
    app.command(name="list")(list_accounts)


def register_watch(app: typer.Typer) -> None:
    """Adds ``watch`` to an app."""
    app.command()(watch)


def list_accounts(context: typer.Context, device: Device = "", as_json: AsJson = False) -> int:
    """The engines that share a device, and what each of them holds. Needs no permission to write.

    Examples:

      kvctl list

      kvcached list --device host:demo --json

      kvctl list --json | jq '.devices[].accounts[] | {name, charge}'
    """
    from kvcached.cli import listing  # the core is loaded where it is needed: see the doctor

    return listing.show(device, as_json, str(context.find_root().info_name))


def watch(
    interval: Annotated[
        float, typer.Option("--interval", "-n", min=0.01, max=86400, help="Seconds between looks.")
    ] = 2.0,
    events: Annotated[
        bool, typer.Option("--events", help="What happens, a line each, instead of the list.")
    ] = False,
    count: Annotated[int, typer.Option(min=0, help="How many looks; 0: until Ctrl-C.")] = 0,
    device: Device = "",
    as_json: AsJson = False,
) -> int:
    """The list again and again, or what happens: instances that join, are ready, leave or die,
    leases refused, memory given back, settings changed. Watching costs the engines nothing.

    Examples:

      kvctl watch -n 0.5

      kvctl watch --events

      kvctl watch --events --json | jq 'select(.event == "refused")'
    """
    from kvcached.cli import watching

    return watching.watch(device, interval, count, events, as_json)
