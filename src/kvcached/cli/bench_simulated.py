"""``kvcached bench fragmentation``, ``simulate``: what only a simulation can show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvcached.cli.options import JsonBesideProgress
from kvcached.errors import ConfigError

Plot = Annotated[Path | None, typer.Option(help="A PNG to write; needs matplotlib.")]
Trace = Annotated[
    Path | None,
    typer.Option(help="A trace to play: CSV as Azure's, JSON lines as Mooncake's."),
]
Seed = Annotated[int, typer.Option(help="The same seed gives the same run.")]


def register(app: typer.Typer) -> None:
    """Adds these commands to an app."""
    app.command()(fragmentation)
    app.command()(simulate)


def fragmentation(
    requests: Annotated[str, typer.Option(help="Requests at once, with commas.")] = "8,32,128",
    pages: Annotated[str, typer.Option(help="Sizes of a page in MiB, with commas.")] = "4,16,32,64",
    modes: Annotated[
        str, typer.Option(help="Of steady, day, compacted, cached; with commas.")
    ] = "steady,day,compacted,cached",
    hours: Annotated[float, typer.Option(min=0.01, help="Simulated hours.")] = 24.0,
    seed: Seed = 1,
    trace: Trace = None,
    plot: Plot = None,
    as_json: JsonBesideProgress = False,
) -> None:
    """Memory that is mapped but holds nothing, after a day of churn: an 8B model's blocks on the
    real allocator and page pool, with requests of a real trace.

    steady: always so many requests; day: they arrive as in the trace, twice as many by day as on
    average in the night; compacted: the same, blocks moved together; cached: with a prefix cache
    that fills the memory.

    Examples:

      kvcached bench fragmentation

      kvcached bench fragmentation --requests 32 --pages 32 --hours 1 --json | jq .runs[0].ratio
    """
    from kvcached.bench import pictures
    from kvcached.bench.fragmentation import MODES, run

    chosen = modes.split(",")
    if unknown := [mode for mode in chosen if mode not in MODES]:
        raise ConfigError(f"--modes: {unknown[0]!r} is none of {', '.join(MODES)}")
    console = Console(stderr=True)
    result = run(
        _numbers(requests, "--requests"),
        _numbers(pages, "--pages"),
        hours=hours,
        seed=seed,
        modes=chosen,
        trace=trace,
        progress=lambda text: console.print(text, highlight=False),
    )
    if plot is not None:
        pictures.fragmentation(result, plot)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        Console().print(_fragmentation_table(result))


def simulate(
    models: Annotated[int, typer.Option(min=1, help="Models of the fleet.")] = 18,
    mix: Annotated[str, typer.Option(help="Their sizes in turn: of 1b, 3b, 8b.")] = "8b,1b,3b",
    rate: Annotated[float, typer.Option(min=0, help="Mean requests a second and model.")] = 0.5,
    busy: Annotated[float, typer.Option(min=0, help="Seconds of a busy spell; 0: always.")] = 30.0,
    rest: Annotated[float, typer.Option(min=0, help="Seconds between spells.")] = 90.0,
    minutes: Annotated[float, typer.Option(min=0.1, help="Simulated minutes.")] = 20.0,
    most_gpus: Annotated[int, typer.Option(min=1, help="Where the sweep ends.")] = 64,
    ttft: Annotated[float, typer.Option(help="SLO: seconds to the first token.")] = 1.0,
    tpot: Annotated[float, typer.Option(help="SLO: seconds between tokens.")] = 0.1,
    seed: Seed = 1,
    trace: Trace = None,
    check: Annotated[
        Path | None, typer.Option(help="A result of multi_llm.py to compare the simulation with.")
    ] = None,
    fit: Annotated[
        bool,
        typer.Option("--fit", help="With --check: the machine as fast as suits its static side."),
    ] = False,
    plot: Plot = None,
    as_json: JsonBesideProgress = False,
) -> None:
    """How many GPUs a fleet of models needs for 99 % of its requests to meet their SLO: one KV
    budget a GPU against fixed parts. With --check only the comparison with a real run.

    Engines and GPUs are simulated, the policy is the real one.

    Examples:

      kvcached bench simulate

      kvcached bench simulate --models 200 --rate 0.25 --json | jq .needed

      kvcached bench simulate --check build/multi-llm/multi_llm.json
    """
    from kvcached.bench import pictures, sim_check
    from kvcached.bench.sim_fleet import Popularity
    from kvcached.bench.sim_shapes import SHAPES
    from kvcached.bench.simulate import Slo, run

    console = Console(stderr=True)
    if check is not None:
        checked = sim_check.check(check, fit)
        _show(checked, _check_table, as_json)
        return
    sizes = mix.split(",")
    if unknown := [size for size in sizes if size not in SHAPES]:
        raise ConfigError(f"--mix: {unknown[0]!r} is none of {', '.join(SHAPES)}")
    result = run(
        models,
        sizes,
        minutes=minutes,
        most_gpus=most_gpus,
        popularity=Popularity(rate_per_model=rate, busy_s=busy, rest_s=rest),
        slo=Slo(ttft, tpot),
        seed=seed,
        trace=trace,
        progress=lambda text: console.print(text, highlight=False),
    )
    if plot is not None:
        pictures.simulation(result, plot)
    _show(result, _simulation_table, as_json)


def _show(result: dict[str, Any], table: Any, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        Console().print(table(result))


def _numbers(text: str, option: str) -> list[int]:
    try:
        numbers = [int(each) for each in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option}: {text!r}: expected whole numbers with commas") from None
    if min(numbers) < 1:
        raise ConfigError(f"{option}: {text!r}: expected 1 or more")
    return numbers


def _fragmentation_table(result: dict[str, Any]) -> Table:
    table = Table(
        title=f"Mapped over in use or cached, {result['hours']:g} simulated hours, "
        f"seed {result['seed']}",
        title_justify="left",
        caption="ratio: over the whole time; holes, warm: what of it is above 1",
        caption_justify="left",
    )
    table.add_column("mode", no_wrap=True)
    for heading in ("requests", "page", "ratio", "p50", "p99", "holes", "warm", "pages/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in result["runs"]:
        ratio = run["ratio"]
        table.add_row(
            run["mode"],
            str(run["at_once"]),
            f"{run['page_mib']} MiB",
            *(f"{ratio[key]:.3f}" for key in ("of_sums", "p50", "p99")),
            f"{run['holes_part']:.3f}",
            f"{run['warm_part']:.3f}",
            f"{run['pages_mapped_per_s']:.2f}",
        )
    return table


def _simulation_table(result: dict[str, Any]) -> Table:
    needs = ", ".join(f"{side} {gpus or 'none'}" for side, gpus in result["needed"].items())
    table = Table(
        title=f"{result['models']} models, {result['requests']} requests in "
        f"{result['minutes']:g} minutes; GPUs needed: {needs}",
        title_justify="left",
    )
    for heading in ("GPUs", "side", "SLO", "TTFT mean", "TTFT p99", "TPOT p99", "preempted"):
        table.add_column(heading, justify="left" if heading == "side" else "right")
    for run in result["runs"]:
        table.add_row(
            str(run["gpus"]),
            run["side"],
            f"{run['slo']:.2%}",
            *(_ms(run[key]) for key in ("ttft_mean_s", "ttft_p99_s", "tpot_p99_s")),
            str(run["preempted"]),
        )
    return table


def _check_table(result: dict[str, Any]) -> Table:
    ratios = ", ".join(
        f"{each['point']} {each['real']:.2f} / {each['simulated']:.2f}"
        for each in result["ratios"]
        if "real" in each and "simulated" in each
    )
    fitted = f"fitted to the {result['fitted_to']} side" if result["fitted_to"] else "not fitted"
    table = Table(
        title=f"Real and simulated, {result['run']} ({result['machine']}, {result['date']}), "
        f"the machine's speed {fitted}",
        title_justify="left",
        caption=f"TTFT mean, static over elastic: {ratios}",
        caption_justify="left",
    )
    for heading in ("point", "side", "TTFT mean", "TTFT p99", "TPOT p50", "SLO", "preempted", ""):
        table.add_column(heading, justify="left" if heading in ("point", "side") else "right")
    for row in result["rows"]:
        real, ours = row["real"], row["simulated"]
        table.add_row(
            row["point"],
            row["side"],
            *(
                f"{_ms(real[key])} / {_ms(ours[key])}"
                for key in ("ttft_mean_s", "ttft_p99_s", "tpot_p50_s")
            ),
            f"{real['slo']:.1%} / {ours['slo']:.1%}",
            f"{real['preempted']:.0f} / {ours['preempted']}",
            "agrees" if row["agrees"] else "does not",
        )
    return table


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.1f} ms"
