"""``kvcached bench serve``: sleeping models against models that stay awake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvcached.cli.edge import FAILED
from kvcached.units import format_size, parse_size


def register(app: typer.Typer) -> None:
    """Adds the command to an app."""
    app.command()(serve)


def serve(
    mode: Annotated[
        list[str] | None, typer.Option(help="`all awake`, `kv`, `stop`; all if not given.")
    ] = None,
    phase: Annotated[float, typer.Option(min=5, help="Seconds of each of four phases.")] = 35.0,
    requests: Annotated[
        int, typer.Option(min=1, max=60, help="Of each active model in each phase.")
    ] = 16,
    budget: Annotated[str, typer.Option(help="What four KV caches may hold.")] = "96MiB",
    out: Annotated[Path, typer.Option(help="Folder for logs and settings.")] = Path(
        "build/bench-serve"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")] = False,
) -> int:
    """Four models with room for two, through one address: a trace, every answer checked.

    Needs vLLM, and kvcached with its extras serve and demo. Ends with 1 where a request was lost
    or answered otherwise than by an engine without kvcached.

    Examples:

      kvcached bench serve

      kvcached bench serve --mode stop --json | jq .modes.stop.ttft_ms
    """
    from kvcached.bench.serve import MODES, Plan, run

    unknown = [each for each in mode or () if each not in MODES]
    if unknown:
        raise typer.BadParameter(f"expected {', '.join(MODES)}, not {unknown[0]}")
    console = Console(stderr=True)
    plan = Plan(phase, requests, parse_size(budget, "--budget"), out)
    result = run(plan, mode or list(MODES), lambda text: console.print(text, highlight=False))
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        Console().print(_table(result))
    good = all(not each["errors"] and not each["wrong"] for each in result["modes"].values())
    return 0 if good else FAILED


def _table(result: dict[str, Any]) -> Table:
    table = Table(
        title=f"{result['requests']} requests to four models; times to first token in ms",
        title_justify="left",
    )
    headings = ("mode", "answered", "wrong", "p50", "p90", "p99", "most", "starts")
    for heading in (*headings, "resident, mean", "peak", "KV, most"):
        table.add_column(heading, justify="right")
    for mode, found in result["modes"].items():
        times = [f"{found['ttft_ms'][key]:.0f}" for key in ("p50", "p90", "p99", "max")]
        sizes = ("resident_mean_bytes", "resident_peak_bytes", "kv_high_water_bytes")
        table.add_row(
            *(mode, str(found["answered"]), str(len(found["wrong"])), *times),
            str(sum(found["starts"].values())),
            *(format_size(found[key]) for key in sizes),
        )
    return table
