"""The edge of a command's process: our own errors become one line and an exit code."""

from __future__ import annotations

import typer

from kvcached.errors import ConfigError, InvalidArgumentError, KvcachedError

FAILED = 1
WRONG_USE = 2
NOT_NOW = 3
"""What was asked for may be possible later: there is not enough memory now."""


def run(app: typer.Typer, name: str) -> None:
    """Runs a command line. Ends with 2 where what was said is not allowed, 1 for other errors."""
    try:
        app()
    except (ConfigError, InvalidArgumentError) as error:
        typer.echo(f"{name}: {error}", err=True)
        raise SystemExit(WRONG_USE) from None
    except KvcachedError as error:
        typer.echo(f"{name}: {error}", err=True)
        raise SystemExit(FAILED) from None
