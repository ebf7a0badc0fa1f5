"""``kvcached bench router``: what the router adds."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvcached.cli.options import JsonBesideProgress


def register(app: typer.Typer) -> None:
    """Adds the command to an app."""
    app.command()(router)


def router(
    rate: Annotated[float, typer.Option(min=1, help="Requests a second.")] = 200.0,
    words: Annotated[int, typer.Option(min=1, help="Parts of each streamed answer.")] = 8,
    gap_ms: Annotated[float, typer.Option(min=0, help="Milliseconds between them.")] = 1.0,
    pairs: Annotated[int, typer.Option(min=1, help="Turns, direct and through.")] = 5,
    seconds: Annotated[float, typer.Option(min=1, help="Seconds of each turn.")] = 10.0,
    requests: Annotated[
        int, typer.Option(min=0, help="Requests while memory is looked at; 0: none.")
    ] = 100_000,
    as_json: JsonBesideProgress = False,
) -> None:
    """What the router adds to a small streamed answer, and whether its memory stays flat.

    The same requests go to an engine that only streams, directly and through the router, turn by
    turn. Needs: pip install 'kvcached\\[serve]'.

    Examples:

      kvcached bench router

      kvcached bench router --requests 0 --json | jq .added_ttft_p50_ms
    """
    from kvcached.bench.router import Shape, run

    console = Console(stderr=True)
    result = run(
        Shape(rate, words, gap_ms / 1e3),
        *(pairs, seconds, requests),
        progress=lambda text: console.print(text, highlight=False),
    )
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        Console().print(_table(result))


def _table(result: dict[str, Any]) -> Table:
    table = Table(
        title=f"{result['rate']:g} requests a second, {result['words']} parts each, milliseconds",
        title_justify="left",
        caption_justify="left",
    )
    if memory := result["memory"]:
        grown = memory["growth_after_a_fifth_bytes"] / 2**20
        table.caption = (
            f"{memory['requests']} requests at {memory['requests_per_s']:.0f}/s: memory "
            f"{memory['rss_bytes'][-1] / 2**20:.1f} MiB, grown by {grown:.2f} MiB after the first "
            "fifth"
        )
    for heading in (
        "pair",
        "added, first byte p50",
        "p99",
        "added, last byte p50",
        "p99",
        "cpu us",
    ):
        table.add_column(heading, justify="right")
    keys = ("added_ttft_p50_ms", "added_ttft_p99_ms", "added_p50_ms", "added_p99_ms", "cpu_us")
    for index, pair in enumerate(result["pairs"]):
        table.add_row(str(index + 1), *(f"{pair[key]:.2f}" for key in keys))
    table.add_section()
    table.add_row("median", *(f"{result[key]:.2f}" for key in keys))
    return table
