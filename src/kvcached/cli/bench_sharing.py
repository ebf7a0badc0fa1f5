"""``kvcached bench hits``, ``reclaim``, ``idle``, ``watchers``: what sharing gives and costs."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvcached.cli.options import JsonBesideProgress
from kvcached.errors import ConfigError
from kvcached.units import MIB, parse_size

DEFAULT_POOLS = "0.8,1.6,3.2,6.4,12.8"


class Kind(str, Enum):
    """What the neighbour does."""

    idle = "idle"
    busy = "busy"


def register(app: typer.Typer) -> None:
    """Adds these commands to an app."""
    app.command()(hits)
    app.command()(reclaim)
    app.command()(idle)
    app.command()(watchers)


def hits(
    trace: Annotated[
        Path, typer.Option(help="A trace whose rows name prefixes: JSON lines as Mooncake's.")
    ],
    pools: Annotated[
        str, typer.Option(help="Memory that both share, in millions of tokens, with commas.")
    ] = DEFAULT_POOLS,
    rows: Annotated[int, typer.Option(min=0, help="Rows of the trace; 0: all.")] = 0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same run.")] = 1,
    picture: Annotated[Path | None, typer.Option(help="A PNG to write; needs matplotlib.")] = None,
    as_json: JsonBesideProgress = False,
) -> None:
    """How much a prefix cache answers: without a cap and with reclaim, with a cap of 16,000 tokens,
    and with a fixed half for each of the two instances.

    Time and engines are simulated, ledger and pools are real; everything repeats for a seed.

    Examples:

      kvcached bench hits --trace mooncake_conversation_trace.jsonl

      kvcached bench hits --trace trace.jsonl --rows 2000 --json | jq .pools[0].reclaim.hit_rate
    """
    from kvcached.bench.hits import draw, run

    console = Console(stderr=as_json)
    result = run(
        trace,
        [_millions(text) for text in pools.split(",")],
        rows=rows or None,
        seed=seed,
        progress=lambda text: console.print(text, highlight=False),
    )
    if picture is not None:
        draw(result, picture)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        console.print(_hits_table(result))


def _millions(text: str) -> int:
    try:
        return int(float(text) * 1e6)
    except ValueError:
        raise ConfigError(f"--pools: {text!r}: expected millions of tokens, such as 0.8") from None


def reclaim(
    engine_arguments: Annotated[
        list[str] | None, typer.Argument(help="More for vllm serve, after two dashes.")
    ] = None,
    instances: Annotated[int, typer.Option(min=2, max=8, help="Engines on the device.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Measured requests of each kind.")] = 50,
    only: Annotated[
        Kind | None, typer.Option(help="One kind: the neighbour rests, or works.")
    ] = None,
    budget: Annotated[str, typer.Option(help="KV-cache memory that they share.")] = "",
    model: Annotated[
        Path | None,
        typer.Option(
            help="A model folder, whose weights are made up where it has none; the demo's small "
            "one if not given."
        ),
    ] = None,
    gpu: Annotated[
        bool, typer.Option("--gpu", help="On the first visible GPU, not in the host's memory.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the engines' logs.")] = Path("build/bench"),
    plot: Annotated[Path | None, typer.Option(help="A PNG to write; needs matplotlib.")] = None,
    as_json: JsonBesideProgress = False,
) -> None:
    """How soon a real engine gets memory that its neighbour only caches: from the demand to the
    lease, and to the first token, with the neighbour at rest and at work.

    Examples:

      kvcached bench reclaim --only idle

      kvcached bench reclaim --instances 4 --json | jq .idle.demand_to_lease_ms

      kvcached bench reclaim --gpu --model ./llama-8b -- --attention-backend FLASH_ATTN
    """
    from kvcached.bench import pictures
    from kvcached.bench.reclaim import KINDS, run

    console = Console(stderr=as_json)
    result = run(
        out,
        instances=instances,
        rounds=rounds,
        kinds=(only.value,) if only else tuple(KINDS),
        budget_bytes=parse_size(budget, "--budget") if budget else 0,
        model=model,
        gpu=gpu,
        engine_arguments=engine_arguments or (),
        seed=seed,
        say=lambda text: console.print(text, highlight=False),
    )
    if plot is not None:
        pictures.reclaim(result, plot)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        console.print(_reclaim_table(result))


def idle(
    watchers: Annotated[int, typer.Option(min=1, max=60, help="Engines that wait.")] = 16,
    seconds: Annotated[float, typer.Option(min=1, help="For each of the two figures.")] = 30.0,
    gpu: Annotated[
        bool, typer.Option("--gpu", help="As on a GPU: each looks every second what others use.")
    ] = False,
    as_json: JsonBesideProgress = False,
) -> None:
    """What the threads cost that wait for pressure: while nothing happens, and while another
    engine asks for memory ten times a second and none of it is theirs to give. Needs vLLM.

    Examples:

      kvcached bench idle

      kvcached bench idle --watchers 16 --gpu --json | jq .quiet_cpu_percent
    """
    from kvcached.bench.idle import run

    result = run(watchers, seconds, gpu)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    typer.echo(
        f"{watchers} watchers: {result['quiet_cpu_percent']:.3f} % of a core quiet, "
        f"{result['rung_cpu_percent']:.3f} % rung {result['rings_per_s']} times a second"
    )


def _hits_table(result: dict[str, Any]) -> Table:
    from kvcached.bench.hits import MODES

    table = Table(
        title=f"Prompt tokens answered from the cache, {result['requests']} requests of "
        f"{result['trace']} (at most {result['most_hits']:.1%})",
        title_justify="left",
    )
    table.add_column("pool, M tokens", justify="right")
    for words in MODES.values():
        table.add_column(words, justify="right")
        table.add_column("wait p99", justify="right")
    for pool in result["pools"]:
        cells = [f"{pool['tokens'] / 1e6:g}"]
        for mode in MODES:
            cells += [f"{pool[mode]['hit_rate']:.1%}", f"{pool[mode]['wait_p99_s']:.1f} s"]
        table.add_row(*cells)
    return table


def _reclaim_table(result: dict[str, Any]) -> Table:
    from kvcached.bench.reclaim import KINDS

    table = Table(
        title=f"{result['instances']} engines, milliseconds (p50 / p99 / max)",
        title_justify="left",
    )
    for heading in (
        *("neighbour", "rounds", "demand to lease", "its step", "past its end"),
        *("first token", "alone", "ratio"),
    ):
        table.add_column(heading, justify="right" if heading != "neighbour" else "left")
    for kind, words in KINDS.items():
        if kind not in result:
            continue
        figures = result[kind]
        spreads = [
            " / ".join(f"{value:.1f}" for value in figures.get(key, {}).values())
            for key in (
                *("demand_to_lease_ms", "neighbour_step_ms", "lease_past_step_ms"),
                *("ttft_ms", "ttft_alone_ms"),
            )
        ]
        table.add_row(words, str(figures["rounds"]), *spreads, f"{figures['ttft_ratio']:.3f}")
    mib = result["request_bytes"] / MIB
    table.caption = f"{mib:.1f} MiB a request"
    if result["bare_release_ms"] is not None:
        table.caption += (
            f", which the kernel's bare calls release in {result['bare_release_ms']:.1f} ms"
        )
    return table


def watchers(
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of phases, watched and alone.")] = 10,
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of a phase.")] = 2.0,
    as_json: JsonBesideProgress = False,
) -> None:
    """Whether kvctl watch, kvtop and the exporter slow an engine's allocations and leases.

    Examples:

      kvcached bench watchers

      kvcached bench watchers --pairs 20 --json | jq .ratio
    """
    from kvcached.bench.watchers import run

    console = Console(stderr=as_json)
    result = run(pairs, seconds, lambda text: console.print(text, highlight=False))
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    table = Table(title="Medians, microseconds an operation", title_justify="left")
    for heading in ("operation", "alone", "watched", "ratio"):
        table.add_column(heading, justify="left" if heading == "operation" else "right")
    for key, ratio in result["ratio"].items():
        alone, watched = result["alone_us"][key], result["watched_us"][key]
        table.add_row(key.removesuffix("_us"), f"{alone:.3f}", f"{watched:.3f}", f"{ratio:.3f}")
    console.print(table)
