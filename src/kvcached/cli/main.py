"""The command ``kvcached``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import kvcached
from kvcached.cli import bench, reading, serve
from kvcached.cli.doctor import command as doctor
from kvcached.cli.edge import run_app
from kvcached.cli.exporter import command as exporter
from kvcached.units import parse_size

app = typer.Typer(
    help="kvcached: several LLM engines share one device's KV-cache memory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # our errors are one line; others keep Python's own form
    rich_markup_mode="rich",
)

app.add_typer(bench.app, name="bench")
reading.register(app)
doctor.register(app)
exporter.register(app)
serve.register(app)


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


def main() -> None:
    """The process's edge."""
    run_app(app, "kvcached")


if __name__ == "__main__":
    main()
