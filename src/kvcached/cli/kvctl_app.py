"""The command line of ``kvctl``. Commands that belong together share a file; each of them registers
itself with ``app``.
"""

from __future__ import annotations

import typer

from kvcached.cli import deleting, reading, reserving, settings

app = typer.Typer(
    help="Who may hold how much of a device's memory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

reading.register(app)
reading.register_watch(app)
settings.register(app)
reserving.register(app)
deleting.register(app)
