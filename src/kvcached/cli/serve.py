"""The command ``kvcached serve``."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcached.cli.edge import FAILED, WRONG_USE, complain
from kvcached.cli.output import columns, document
from kvcached.config import child_environment

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvcached.router.service import ElsewhereEngines
    from kvcached.router.settings import ServeSettings
    from kvcached.router.settings_file import Problem

DEMO_FOLDER = Path("build/models")


def register(app: typer.Typer) -> None:
    """Adds the command to an app."""
    app.command()(serve)


def serve(
    file: Annotated[
        Path | None, typer.Argument(help="The settings, YAML; the demo's models without it.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Look at the file and this machine, and end.")
    ] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of the file, and end.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")] = False,
) -> int:
    """Many models behind one OpenAI-compatible address.

    Starts engines (vLLM, SGLang) with the service or with their first request, restarts those that
    fail, puts idle ones to sleep, and ends all of them on SIGTERM. All errors of the file name its
    line and field; --check ends with 2 where there is one.

    Examples:

      kvcached serve models.yaml

      kvcached serve models.yaml --check

      kvcached serve --schema > serve.schema.json
    """
    try:
        import kvcached.router.service  # noqa: F401
        from kvcached.router.settings import json_schema
    except ModuleNotFoundError as error:
        complain("kvcached", f"{error}; it needs: pip install 'kvcached[serve]'")
        return FAILED
    if schema:
        typer.echo(json.dumps(json_schema(), indent=2))
        return 0
    if check and file is None:
        raise typer.BadParameter("--check looks at a file: name one")
    settings, problems = _settings(file)
    if check and as_json:
        _print_check(settings, problems)
    else:
        for problem in problems:
            print(problem, file=sys.stderr)
    if settings is None or problems:
        return WRONG_USE
    if not check:
        return _run(settings, as_json)
    if not as_json:
        _print_models(settings)
    return 0


def _settings(file: Path | None) -> tuple[ServeSettings | None, list[Problem]]:
    """The settings, None where they cannot be read at all, and everything that is wrong."""
    from kvcached.router.engine_command import misfits
    from kvcached.router.settings import ServeSettings
    from kvcached.router.settings_file import SettingsError, load

    environment = _environment()
    if file is None:
        from kvcached.demo.service import demo_settings

        return ServeSettings.model_validate(demo_settings(DEMO_FOLDER)), []
    try:
        loaded = load(file, environment)
    except SettingsError as error:
        return None, list(error.problems)
    problems = [loaded.problem(*each) for each in misfits(loaded.settings, environment)]
    return loaded.settings, sorted(problems, key=lambda problem: problem.line)


def _environment() -> dict[str, str]:
    """What engines inherit: everything, but not who an engine is."""
    environment = child_environment({}, whole=True)
    environment.pop("KVCACHED_INSTANCE", None)
    return environment


def _models(settings: ServeSettings) -> list[dict[str, Any]]:
    from kvcached.router.engine_command import engine_command, engine_environment, on_gpu
    from kvcached.router.engine_command import how_it_sleeps as how

    environment = _environment()
    return [
        {
            "name": model.name,
            "aliases": model.aliases,
            "engine": model.engine,
            "start": model.start,
            "sleeps": how(
                settings, model, on_gpu(engine_environment(settings, model, environment))
            ),
            "command": shlex.join(engine_command(settings, model, 0, environment).arguments),
        }
        for model in settings.models
    ]


def _print_check(settings: ServeSettings | None, problems: list[Problem]) -> None:
    found = [
        {"file": each.file, "line": each.line, "field": each.field, "text": each.text}
        for each in problems
    ]
    models = [] if settings is None or problems else _models(settings)
    fields = {"ok": not problems, "problems": found, "models": models}
    typer.echo(document("serve-check", fields, indent=2))


def _print_models(settings: ServeSettings) -> None:
    rows = [["model", "engine", "start", "sleeps"]]
    rows += [
        [each["name"], each["engine"], each["start"], each["sleeps"]] for each in _models(settings)
    ]
    for line in columns(rows):
        typer.echo(line)


def _run(settings: ServeSettings, as_json: bool) -> int:
    import uvloop

    from kvcached.router import service

    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    for chatty in ("httpx", "uvicorn", "asyncio"):
        logging.getLogger(chatty).setLevel(logging.WARNING)

    output = sys.stdout

    def announce(url: str) -> None:
        names = ", ".join(model.name for model in settings.models)
        print(f"serving {names} on {url}", file=sys.stderr, flush=True)
        if as_json:
            typer.echo(document("serve", {"url": url, "pid": os.getpid()}), file=output)

    def show(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if settings.hosts is None:
        return 0 if uvloop.run(service.run(settings, _environment(), show, announce)) else FAILED
    with contextlib.redirect_stdout(sys.stderr):  # Ray prints what it has to say of nodes
        try:
            elsewhere = _on_hosts(settings, show)
        except ModuleNotFoundError as error:
            complain("kvcached", f"{error}; several hosts need: pip install 'kvcached[ray]'")
            return FAILED
        ran = service.run(settings, _environment(), show, announce, elsewhere)
        return 0 if uvloop.run(ran) else FAILED


def _on_hosts(
    settings: ServeSettings, show: Callable[[str], None]
) -> Callable[[], ElsewhereEngines]:
    """Joins the cluster. Ray is imported here and nowhere else."""
    assert settings.hosts is not None
    from kvcached.hosts.engines import HostedEngines
    from kvcached.hosts.ray_nodes import RayCluster

    cluster = RayCluster(settings.hosts)
    return lambda: HostedEngines(settings, cluster, show)
