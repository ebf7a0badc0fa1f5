"""The edge of a command's process: an error becomes one line and an exit code.

It imports nothing but our exceptions: a command that answers in milliseconds starts here too.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from kvcached.errors import ConfigError, InvalidArgumentError, KvcachedError

if TYPE_CHECKING:
    import typer

FAILED = 1
WRONG_USE = 2
NOT_NOW = 3
"""What was asked for may be possible later: there is not enough memory now."""
INTERRUPTED = 130


def run(name: str, command: Callable[[], int]) -> NoReturn:
    """Runs a command and ends the process with what it returns. Call it in the main thread.

    Ends with 2 where what was said is not allowed, 1 for other errors. SIGTERM unwinds it as Ctrl-C
    does: the engines that a command has started end with it.
    """
    signal.signal(signal.SIGTERM, _end)
    try:
        code = command()
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        # Who read our output has ended. Nothing more is written, also not by the interpreter.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAILED
    except (ConfigError, InvalidArgumentError) as error:
        complain(name, error)
        code = WRONG_USE
    except (KvcachedError, OSError) as error:
        complain(name, error)
        code = FAILED
    raise SystemExit(code)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def run_app(app: typer.Typer, name: str) -> NoReturn:
    """Runs a command line of typer's."""
    run(name, lambda: call(app, name))


def call(app: typer.Typer, name: str) -> int:
    """What the command line returns; wrong use of it is one line, as all errors are."""
    import typer

    # The base of typer's own errors; where it lies differs between versions.
    wrong_use: type[Any] = next(
        c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException"
    )
    try:
        return app(prog_name=name, standalone_mode=False) or 0
    except typer.Abort:
        return INTERRUPTED
    except wrong_use as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            return WRONG_USE
        context = getattr(error, "ctx", None)
        hint = f" (see: {context.command_path} --help)" if context is not None else ""
        complain(name, f"{error.format_message()}{hint}")
        return WRONG_USE


def complain(name: str, error: object) -> None:
    """One line on stderr."""
    print(f"{name}: {one_line(str(error))}", file=sys.stderr)


def one_line(text: str) -> str:
    """Text for a line of a terminal: what others named must not move its cursor."""
    if text.isprintable():
        return text
    words = " ".join(text.split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)
