"""What several commands ask for, and how a shell completes it."""

from __future__ import annotations

from typing import Annotated

import typer

from kvcached.config import Config
from kvcached.errors import KvcachedError


def complete_name(incomplete: str) -> list[str]:
    """Instances whose names begin so."""
    from kvcached.observe import Observer

    try:
        with Observer(Config.from_env().directory) as looks:
            names = {a.name for each in looks.read() for a in each.accounts}
    except KvcachedError:  # a shell that completes has no place for messages
        return []
    return sorted(name for name in names if name.startswith(incomplete))


def complete_device(incomplete: str) -> list[str]:
    """Devices whose names begin so."""
    from kvcached.devices import shared

    try:
        names = shared(Config.from_env().directory)
    except KvcachedError:
        return []
    return [name for name in names if name.startswith(incomplete)]


Name = Annotated[
    str,
    typer.Argument(help="The instance, as ``kvctl list`` names it.", autocompletion=complete_name),
]
Device = Annotated[
    str,
    typer.Option(help="The device, where engines share several.", autocompletion=complete_device),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
JsonBesideProgress = Annotated[
    bool, typer.Option("--json", help="Print JSON to stdout; progress to stderr.")
]
