"""``kvcached bench scale``, ``elasticity``: what size costs, and how soon it changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvcached.cli.options import JsonBesideProgress
from kvcached.units import format_size, parse_size

Plot = Annotated[Path | None, typer.Option(help="A PNG to write; needs matplotlib.")]
BackendName = Annotated[str, typer.Option(help="host, or a GPU: cuda:N.")]

PARTS = {
    "blocks": "blocks in a pool",
    "instances": "instances on a ledger",
    "standings": "accounts, the policy's arithmetic alone",
    "pages": "bytes of a page",
}


def register(app: typer.Typer) -> None:
    """Adds these commands to an app."""
    app.command()(scale)
    app.command()(elasticity)


def scale(
    backend: BackendName = "host",
    page_size: Annotated[str, typer.Option(help="The smallest page.")] = "64KiB",
    rounds: Annotated[int, typer.Option(min=1, help="Figures are medians.")] = 200,
    plot: Plot = None,
    as_json: JsonBesideProgress = False,
) -> None:
    """What operations cost as blocks, accounts and bytes of a page grow by a thousand.

    Examples:

      kvcached bench scale

      kvcached bench scale --backend cuda:0 --page-size 2MiB --json | jq .pages
    """
    from kvcached.bench import pictures
    from kvcached.bench.scale import growth, run

    result = run(backend, parse_size(page_size, "--page-size"), rounds)
    result["growth"] = {part: growth(result[part]) for part in PARTS}
    if plot is not None:
        pictures.scale(result, plot)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    console = Console()
    for part in PARTS:
        console.print(_scale_table(part, result))


def elasticity(
    backend: BackendName = "host",
    page_size: Annotated[str, typer.Option(help="Size of a page.")] = "2MiB",
    pages: Annotated[int, typer.Option(min=2, help="How far it grows.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Figures are medians.")] = 20,
    plot: Plot = None,
    as_json: JsonBesideProgress = False,
) -> None:
    """How fast a KV cache grows and gives back, and what it keeps at rest: one instance here.

    Examples:

      kvcached bench elasticity

      kvcached bench elasticity --backend cuda:0 --page-size 32MiB --pages 640
    """
    from kvcached.bench import pictures
    from kvcached.bench.elasticity import run

    result = run(backend, parse_size(page_size, "--page-size"), pages, rounds)
    if plot is not None:
        pictures.elasticity(result, plot)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        Console().print(_elasticity_table(result))


def _scale_table(part: str, result: dict[str, Any]) -> Table:
    table = Table(title=f"By {PARTS[part]}, microseconds", title_justify="left")
    table.add_column("operation")
    for size in result[part]:
        table.add_column(format_size(size) if part == "pages" else str(size), justify="right")
    table.add_column("growth", justify="right")
    for key, growth in result["growth"][part].items():
        cells = [f"{figures[key]:.3f}" for figures in result[part].values()]
        table.add_row(key.removesuffix("_us"), *cells, f"{growth:.2f}")
    return table


def _elasticity_table(result: dict[str, Any]) -> Table:
    size = format_size(result["page_bytes"])
    table = Table(
        title=f"{result['pages']} pages of {size} on {result['backend']}, medians of "
        f"{result['rounds']} rounds",
        title_justify="left",
    )
    for heading in ("", "ms", "slowest", "GiB/s"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row("open", f"{result['open_ms']:.2f}", "", "")
    table.add_row("the first page's blocks", f"{result['first_blocks_ms']:.2f}", "", "")
    for way, words in (("grow", "grow by the others"), ("shrink", "give all back")):
        figures = (result[f"{way}_ms"], result[f"{way}_slowest_ms"], result[f"{way}_gib_per_s"])
        table.add_row(words, *(f"{figure:.2f}" for figure in figures))
    table.caption = f"at rest: {result['rest_pages']} pages, {format_size(result['rest_bytes'])}"
    return table
