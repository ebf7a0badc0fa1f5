"""The command ``kvcached exporter``."""

from __future__ import annotations

import contextlib
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from kvcached.cli.edge import FAILED, complain
from kvcached.cli.options import complete_device
from kvcached.errors import ConfigError

DEFAULT_PORT = 9877
MIN_TOKEN = 16


def register(app: typer.Typer) -> None:
    """Adds the command to an app."""
    app.command()(exporter)


def exporter(
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0: any.")] = DEFAULT_PORT,
    token_file: Annotated[
        Path | None,
        typer.Option(help="A file with a token that allows the page to change limits."),
    ] = None,
    interval: Annotated[
        float, typer.Option(min=0.05, max=3600, help="Seconds between the page's samples.")
    ] = 1.0,
    device: Annotated[
        str,
        typer.Option(
            help="One device; all shared ones if not given.", autocompletion=complete_device
        ),
    ] = "",
    serve: Annotated[
        str, typer.Option(help="The address of a `kvcached serve`: the page shows its models.")
    ] = "",
    serve_key_file: Annotated[
        Path | None, typer.Option(help="A file with an API key that opens all of its models.")
    ] = None,
) -> int:
    """Prometheus metrics (/metrics) and a live page (/) of all ledgers.

    It only reads, unless a token is given: then the page can change limits for who knows it. A
    Grafana dashboard and alert rules are in examples/monitoring/.

    Examples:

      kvcached exporter

      kvcached exporter --host 0.0.0.0 --port 9877

      head -c 24 /dev/urandom | base64 > token; kvcached exporter --token-file token

      kvcached exporter --serve http://127.0.0.1:8000
    """
    try:
        from kvcached.cli.exporter.history import History
        from kvcached.cli.exporter.served import Served
        from kvcached.cli.exporter.server import Exporter
    except ModuleNotFoundError as error:
        complain("kvcached", f"{error}; the exporter needs: pip install 'kvcached[tools]'")
        return FAILED
    from kvcached.cli.listing import observer

    token = _token(token_file) if token_file is not None else None
    key = _text("--serve-key-file", serve_key_file) if serve_key_file is not None else ""
    with contextlib.ExitStack() as open_ones:
        looks = open_ones.enter_context(observer(device))
        history = open_ones.enter_context(History(observer(device), interval))
        served = open_ones.enter_context(Served(serve, key, interval)) if serve else None
        try:
            server = Exporter((host, port), looks, history, token, served)
        except OSError as error:
            raise ConfigError(f"--host {host} --port {port}: {error.strerror}") from None
        with server:
            history.start()
            # serve_forever ends when another thread says so; a handler must not wait for it.
            for number in (signal.SIGINT, signal.SIGTERM):
                stop = threading.Thread(target=server.shutdown, daemon=True)
                signal.signal(number, lambda *_, stop=stop: stop.is_alive() or stop.start())
            where = f"http://{host}:{server.server_address[1]}"
            typer.echo(f"metrics on {where}/metrics, page on {where}/", err=True)
            server.serve_forever(poll_interval=0.1)
    return 0


def _text(option: str, path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option} {path}: {error}") from None


def _token(path: Path) -> str:
    token = _text("--token-file", path)
    if len(token) < MIN_TOKEN or not token.isascii() or not token.isprintable():
        raise ConfigError(f"--token-file {path}: expected at least {MIN_TOKEN} ASCII characters")
    return token
