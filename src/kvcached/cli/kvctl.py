"""The command ``kvctl``: who may hold how much, changed while engines run.

No command needs the engines' consent or a server: settings are rows of the ledger, and engines
follow them within a moment. Commands that belong together share a file; each of them registers
itself with ``app``.
"""

from __future__ import annotations

import typer

from kvcached.cli import listing, reserving, settings
from kvcached.cli.edge import run

app = typer.Typer(
    help="Who may hold how much of a device's memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

listing.register(app)
settings.register(app)
reserving.register(app)


def main() -> None:
    """The process's edge."""
    run(app, "kvctl")


if __name__ == "__main__":
    main()
