"""``kvctl reserve``: room for a program that is no engine; see ``kvcached.holds``."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from typing import Annotated

import typer

from kvcached.cli.edge import NOT_NOW, complain
from kvcached.cli.options import AsJson, Device
from kvcached.cli.output import document
from kvcached.errors import ConfigError
from kvcached.holds import Hold
from kvcached.units import format_size

GRACE_S = 2.0
"""Without ``--wait``: cached memory comes back within this time, or does not."""


def register(app: typer.Typer) -> None:
    """Adds the command to an app."""
    app.command()(reserve)


def reserve(
    size: Annotated[str, typer.Argument(help="How much, such as 20GiB.")],
    pid: Annotated[
        int, typer.Option("--for", min=0, help="Keep it until this process has ended.")
    ] = 0,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for memory that is in use; Ctrl-C gives up.")
    ] = False,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds that --wait waits; 0: any.")] = 0.0,
    detach: Annotated[
        bool, typer.Option("--detach", help="With --for: return once it is kept.")
    ] = False,
    device: Device = "",
    as_json: AsJson = False,
) -> None:
    """Makes room for a training job or another engine: cached memory goes back until so much is
    really free on the device, and engines lease none of it while this command runs.

    It runs until the process of --for has ended, or until it is interrupted. What that process
    takes on a GPU is measured, and not kept a second time. Ends with 3 where too much is in use.

    Examples:

      kvctl reserve 20GiB --wait

      kvctl reserve 20GiB --for $(pidof -s python) --detach
    """
    watched = _watch(pid) if pid else None
    if detach:
        _detach(size, pid, wait, timeout, device, as_json)
        return
    start_s = time.monotonic()
    try:
        with Hold(size, device or None) as hold:
            if not hold.wait((timeout or None) if wait else GRACE_S):
                _say_no(hold, as_json)
                raise typer.Exit(NOT_NOW)
            _say_yes(hold, time.monotonic() - start_s, as_json)
            select.select([] if watched is None else [watched], [], [])
    except KeyboardInterrupt:
        raise typer.Exit from None


def _watch(pid: int) -> int:
    """A descriptor that becomes readable when the process has ended."""
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        raise ConfigError(f"--for {pid}: {error.strerror}") from None


def _say_yes(hold: Hold, waited_s: float, as_json: bool) -> None:
    if as_json:
        result = {"device": hold.device, "size": hold.size_bytes, "kept": True}
        more = {"pid": os.getpid(), "waited_s": round(waited_s, 3)}
        typer.echo(document("reserve", {**result, **more}))
    else:
        typer.echo(f"{format_size(hold.size_bytes)} of {hold.device} are free and kept")
    sys.stdout.flush()  # somebody may wait for this line at the other end of a pipe


def _say_no(hold: Hold, as_json: bool) -> None:
    if as_json:
        result = {"device": hold.device, "size": hold.size_bytes, "kept": False}
        typer.echo(document("reserve", {**result, "holders": hold.holders()}))
    else:
        size = format_size(hold.size_bytes)
        complain("kvctl", f"{size} of {hold.device} are not free: {hold.holders()}")


def _detach(size: str, pid: int, wait: bool, timeout: float, device: str, as_json: bool) -> None:
    """Runs the same command apart from this terminal, and returns when it keeps the memory."""
    if not pid:
        raise ConfigError("--detach: expected --for PID, which says when the memory is free again")
    command = [sys.executable, "-m", "kvcached.cli.kvctl", "reserve", size, "--for", str(pid)]
    command += ["--wait", "--timeout", str(timeout)] if wait else []
    command += ["--device", device] if device else []
    command += ["--json"] if as_json else []
    holder = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert holder.stdout is not None
    with holder.stdout as pipe:
        line = pipe.readline()
    typer.echo(line, nl=False)
    if not line or (as_json and not json.loads(line)["kept"]):
        raise typer.Exit(holder.wait())
