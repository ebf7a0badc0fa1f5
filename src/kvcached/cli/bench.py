"""``kvcached bench``: what kvcached costs, measured here."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvcached.units import format_size, parse_size

app = typer.Typer(help="What kvcached costs, measured here.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to stdout; progress to stderr.")]


class BackendName(str, Enum):
    """The backends that a benchmark can run on."""

    host = "host"


@app.command()
def alloc(
    backend: Annotated[
        BackendName, typer.Option(help="The memory under the blocks; allocating never touches it.")
    ] = BackendName.host,
    num_blocks: Annotated[int, typer.Option(min=1024, help="Blocks in the pool.")] = 1 << 16,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; figures are medians.")] = 200,
    as_json: AsJson = False,
) -> None:
    """What handing out a block costs: our core and, where vLLM is installed, the adapter's pool
    beside vLLM's own.

    Examples:

      kvcached bench alloc

      kvcached bench alloc --backend host --json | jq .alloc1_warm_us
    """
    from kvcached.bench.alloc import run

    result = {"backend": backend.value, **run(num_blocks, rounds)}
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    console = Console()
    for table in _alloc_tables(result):
        console.print(table)


@app.command()
def vmm(
    backend: Annotated[str, typer.Option(help="host, or a GPU: cuda:N.")] = "host",
    page_size: Annotated[str, typer.Option(help="Size of a page.")] = "2MiB",
    rounds: Annotated[int, typer.Option(min=1, help="Pages in and out; medians.")] = 400,
    as_json: AsJson = False,
) -> None:
    """What mapping a page costs through our arena, beside the bare driver calls in the same run,
    and what opening an arena of 64 GiB costs.

    Examples:

      kvcached bench vmm

      kvcached bench vmm --backend cuda:0 --json | jq .page_in_kept_ratio
    """
    from kvcached.bench.vmm import run

    result = run(backend, parse_size(page_size, "--page-size"), rounds)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        Console().print(_vmm_table(result))


@app.command()
def engine(
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of rounds, elastic and plain.")] = 5,
    requests: Annotated[
        int, typer.Option(min=1, help="Requests in a round, sent at once; they must fit.")
    ] = 24,
    budget: Annotated[str, typer.Option(help="KV-cache memory of each engine.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for the engines' logs.")] = Path("build/bench"),
    as_json: AsJson = False,
) -> None:
    """The speed of one elastic vLLM engine against that of one plain engine, turn by turn.

    Examples:

      kvcached bench engine

      kvcached bench engine --pairs 5 --json | jq .overhead_vs_plain
    """
    from kvcached.bench.engine import run
    from kvcached.demo.setups import DEFAULT_BUDGET

    budget_bytes = parse_size(budget, "--budget") if budget else DEFAULT_BUDGET
    console = Console(stderr=as_json)
    result = run(out, pairs, requests, budget_bytes, lambda text: console.print(text))
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        console.print(_engine_table(result))


def _alloc_tables(result: dict[str, Any]) -> list[Table]:
    core = Table(title="Core allocator, warm, microseconds", title_justify="left")
    core.add_column("operation")
    sizes = {f"{size} blocks": figures for size, figures in result["by_num_blocks"].items()}
    columns = {f"{result['num_blocks']} blocks": result, **sizes}
    for heading in columns:
        core.add_column(heading, justify="right")
    for key in next(iter(sizes.values())):
        core.add_row(key.removesuffix("_us"), *(f"{c[key]:.3f}" for c in columns.values()))
    tables = [core]
    if any(key.startswith("vllm_") for key in result):
        pools = Table(title="Block pool of vLLM, microseconds", title_justify="left")
        pools.add_column("operation")
        for heading in ("kvcached", "vLLM's own", "ratio"):
            pools.add_column(heading, justify="right")
        for key in (key for key in result if key.startswith("pool_")):
            ours, theirs = result[key], result[f"vllm_{key}"]
            ratio = f"{ours / theirs:.2f}" if theirs else ""
            pools.add_row(key.removesuffix("_us"), f"{ours:.3f}", f"{theirs:.3f}", ratio)
        tables.append(pools)
    return tables


def _vmm_table(result: dict[str, Any]) -> Table:
    size = format_size(result["page_bytes"])
    table = Table(
        title=f"A page of {size} on {result['backend']}, microseconds",
        title_justify="left",
        caption=f"An arena of 64 GiB with its tensors: {result['arena_open_64gib_ms']:.2f} ms, "
        f"{result['arena_open_host_mib']:.2f} MiB of host memory",
        caption_justify="left",
    )
    table.add_column("operation")
    for heading in ("arena", "bare calls", "ratio"):
        table.add_column(heading, justify="right")
    for way in ("in", "out"):
        for handle, words in (("kept", "kept handle"), ("new", "new handle")):
            ours, bare, ratio = (
                result[key]
                for key in (
                    f"page_{way}_{handle}_us",
                    f"bare_{way}_{handle}_us",
                    f"page_{way}_{handle}_ratio",
                )
            )
            table.add_row(f"{way}, {words}", f"{ours:.2f}", f"{bare:.2f}", f"{ratio:.2f}")
    return table


def _engine_table(result: dict[str, Any]) -> Table:
    budget = format_size(result["budget_bytes"])
    table = Table(
        title=f"One engine alone, {result['requests']} requests at once, budget {budget}",
        title_justify="left",
    )
    for heading in ("pair", "elastic tokens/s", "plain tokens/s", "ratio", "processor time ratio"):
        table.add_column(heading, justify="right")
    for index, pair in enumerate(result["overhead_pairs"]):
        table.add_row(
            str(index + 1),
            f"{pair['elastic_tokens_per_s']:.1f}",
            f"{pair['plain_tokens_per_s']:.1f}",
            f"{pair['ratio']:.3f}",
            f"{pair['cpu_ratio']:.3f}",
        )
    table.add_section()
    table.add_row(
        "median", "", "", f"{result['overhead_vs_plain']:.3f}", f"{result['cpu_vs_plain']:.3f}"
    )
    return table
