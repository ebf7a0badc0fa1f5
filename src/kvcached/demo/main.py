"""The demo from beginning to end."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace

from rich.console import Console

from kvcached.demo import setups
from kvcached.demo.compare import Comparison, compare
from kvcached.demo.figures import Session
from kvcached.demo.load import Target
from kvcached.demo.models import Model, make_models
from kvcached.demo.plot import draw_memory
from kvcached.demo.report import Outcome, build_report, print_report, write_report
from kvcached.demo.screen import Screen
from kvcached.demo.session import run_session
from kvcached.demo.setups import Options
from kvcached.demo.trace import PHASES, make_load
from kvcached.units import format_size


def run_demo(options: Options, console: Console) -> dict[str, object]:
    """Runs everything and returns the report, which is also on disk.

    Raises KvcachedError when an engine or a model cannot be had; an outcome that is not good is in
    the report under "failures".
    """
    started_s = time.monotonic()
    screen = Screen(console)
    options.out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(options.ledger_directory, ignore_errors=True)
    screen.say("making the models (once; about a minute with the download)")
    models = dict(zip("AB", make_models(options.out.parent / "models"), strict=True))
    screen.say(
        f"{options.shape.total} requests from a slice of the Azure conversation trace, lengths "
        f"scaled down; budget {format_size(options.budget_bytes)}"
    )
    outcome = _run_sessions(options, models, screen, started_s)
    report = build_report(outcome)
    write_report(report, options.out / "report.json")
    names = {name: model.name for name, model in models.items()}
    picture = options.out / "memory.png"
    draw_memory(outcome.elastic, outcome.static, options.budget_bytes, names, picture)
    print_report(report, console, options.out)
    return report


def _run_sessions(
    options: Options, models: dict[str, Model], screen: Screen, started_s: float
) -> Outcome:
    """The reference first: it says what outputs are right, and how fast this machine is. The static
    halves last: plain engines too, they judge outputs that differ while they are up.
    """
    reference = None
    if not options.fast:
        reference = run_session(
            setups.reference(options, models),
            options,
            make_load(options.shape, models),
            screen,
            runs=1,
            paced=False,
            alone=True,
        )
        seconds = {name: phase.seconds for name in PHASES for phase in reference.phase(name)}
        options = replace(options, shape=options.shape.paced(seconds))
    load = make_load(options.shape, models)
    elastic = run_session(
        setups.elastic(options, models), options, load, screen, runs=options.runs, alone=True
    )
    verdicts: list[Comparison] = []

    def judge(static: Session, targets: dict[str, Target]) -> None:
        plain = static if reference is None else reference
        verdicts.append(compare(elastic.results(), plain.first_run(), targets))

    static = run_session(
        setups.static(options, models),
        options,
        load,
        screen,
        runs=options.runs,
        alone=options.fast,
        before_stop=judge,
    )
    elapsed_s = time.monotonic() - started_s
    return Outcome(options, models, elastic, static, reference, verdicts[0], elapsed_s)
