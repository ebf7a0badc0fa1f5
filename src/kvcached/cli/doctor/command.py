"""The command ``kvcached doctor``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated

import typer

from kvcached.cli.doctor import engines, machine
from kvcached.cli.doctor.finding import Finding, Level
from kvcached.cli.edge import FAILED, one_line

_MARKS = {
    Level.ok: "ok     ",
    Level.note: "note   ",
    Level.warning: "WARNING",
    Level.error: "ERROR  ",
}


def register(app: typer.Typer) -> None:
    """Adds the command to an app."""
    app.command()(doctor)


def doctor(
    engine: Annotated[
        str,
        typer.Option(help="This engine (vllm, sglang) must be here, supported, and hooked up."),
    ] = "",
    strict: Annotated[bool, typer.Option("--strict", help="Fail on warnings too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """What is wrong on this machine and in this environment, and what to do about it.

    It looks at the compiled core, the kernel, the GPU's driver, the engines that are installed and
    whether kvcached takes hold of them, the folder of the ledgers, leftovers of the dead, and
    whether two ledgers govern one device. Ends with 1 where something is wrong.

    Examples:

      kvcached doctor

      kvcached doctor --engine vllm --strict

      kvcached doctor --json | jq '.findings[] | select(.level != "ok")'
    """
    found = list(findings(engine))
    bad = {Level.error, Level.warning} if strict else {Level.error}
    healthy = not any(finding.level in bad for finding in found)
    if as_json:
        from kvcached.cli.output import document

        fields = {"ok": healthy, "findings": [asdict(finding) for finding in found]}
        typer.echo(document("doctor", fields, indent=2))
    else:
        for finding in found:
            typer.echo(f"{_MARKS[finding.level]} {finding.check}: {one_line(finding.text)}")
            if finding.do:
                typer.echo(f"        -> {one_line(finding.do)}")
        counts = {level: sum(f.level is level for f in found) for level in Level}
        typer.echo(f"{counts[Level.error]} errors, {counts[Level.warning]} warnings")
    return 0 if healthy else FAILED


def findings(engine: str = "") -> Iterator[Finding]:
    """Everything that the doctor has to say."""
    core = list(machine.core())
    yield from core
    whole = all(finding.level is not Level.error for finding in core)
    if whole:
        yield from machine.host()
        yield from machine.gpu()
    yield from engines.engines(engine)
    settings = list(engines.settings())
    yield from settings
    if whole and all(finding.level is not Level.error for finding in settings):
        from kvcached.cli.doctor import ledgers
        from kvcached.config import Config

        config = Config.from_env()
        yield from ledgers.folder(config)
        yield from ledgers.ledgers(config)
