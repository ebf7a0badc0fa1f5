"""The command ``kvcached``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import kvcached
from kvcached.cli import bench
from kvcached.cli.accounts import LedgerFigures, LedgerReader
from kvcached.config import Config
from kvcached.errors import ConfigError, KvcachedError
from kvcached.units import format_size, parse_size

app = typer.Typer(
    help="kvcached: several LLM engines share one device's KV-cache memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # our errors are one line; others keep Python's own form
    rich_markup_mode="rich",
)

app.add_typer(bench.app, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvcached {kvcached.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """kvcached: several LLM engines share one device's KV-cache memory."""


@app.command()
def demo(
    budget: Annotated[
        str, typer.Option(help="Memory that both engines share, such as 224MiB.")
    ] = "",
    prefix_caching: Annotated[
        bool, typer.Option("--prefix-caching/--no-prefix-caching", help="Prefix caching of vLLM.")
    ] = True,
    runs: Annotated[
        int, typer.Option(min=1, help="Times that the load is played; figures are medians.")
    ] = 1,
    fast: Annotated[
        bool,
        typer.Option(help="Without the reference engines; the static halves judge the outputs."),
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for the report, the picture and logs.")] = Path(
        "build/demo"
    ),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print report.json to stdout; progress to stderr.")
    ] = False,
) -> None:
    """Two real vLLM engines share one budget, compared with two that own half of it each.

    Needs vLLM (``make env`` builds an environment with vLLM for the CPU). Ends with 0 only when
    every request was answered, outputs equal the plain engine's, and the budget was kept.

    Examples:

      kvcached demo

      kvcached demo --runs 3 --no-prefix-caching

      kvcached demo --fast --json | jq .ttft_p99_static_over_elastic
    """
    from kvcached.demo.main import run_demo
    from kvcached.demo.setups import DEFAULT_BUDGET, Options

    budget_bytes = parse_size(budget, "--budget") if budget else DEFAULT_BUDGET
    options = Options(
        out=out,
        budget_bytes=budget_bytes,
        prefix_caching=prefix_caching,
        runs=runs,
        fast=fast,
    )
    report = run_demo(options, Console(stderr=as_json))
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    if report["failures"]:
        raise typer.Exit(1)


@app.command(name="list")
def list_accounts(
    device: Annotated[
        str, typer.Option(help="The device, such as host:default; KVCACHED_DEVICE if not given.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The engines that share a device, and what each of them holds.

    Examples:

      kvcached list

      kvcached list --device host:demo --json
    """
    from dataclasses import asdict

    config = Config.from_env()
    chosen = (device,) if device else tuple(dict.fromkeys(config.devices)) or ("host:default",)
    figures = [LedgerReader(config.directory, name).read() for name in chosen]
    if as_json:
        found = [asdict(each) for each in figures]
        typer.echo(json.dumps(found[0] if len(found) == 1 else found, indent=2))
        return
    for name, each in zip(chosen, figures, strict=True):
        Console().print(_table(name, each))


def _table(device: str, figures: LedgerFigures) -> Table:
    """A row for each engine that shares the device."""
    table = Table(title=f"{device}: {format_size(figures.capacity)}", title_justify="left")
    table.add_column("instance")
    for heading in ("charge", "created", "in use", "cached", "warm", "demand"):
        table.add_column(heading, justify="right")
    for account in figures.accounts:
        sizes = (
            account.charge,
            account.created,
            account.in_use,
            account.cached,
            account.warm,
            account.demand,
        )
        table.add_row(account.name, *(format_size(size) for size in sizes))
    return table


def main() -> None:
    """The process's edge: our own errors become one line and an exit code."""
    try:
        app()
    except ConfigError as error:
        typer.echo(f"kvcached: {error}", err=True)
        raise SystemExit(2) from None
    except KvcachedError as error:
        typer.echo(f"kvcached: {error}", err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
