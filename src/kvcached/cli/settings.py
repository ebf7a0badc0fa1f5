"""``kvctl limit``, ``limit-percent``, ``guarantee``, ``weight``, ``reclaim``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer

from kvcached import devices
from kvcached.cli.edge import NOT_NOW
from kvcached.config import Config
from kvcached.errors import ConfigError, InvalidArgumentError
from kvcached.ledger import Ledger
from kvcached.snapshot import AccountSnapshot
from kvcached.units import format_size, parse_size

EFFECT_S = 1.0
"""How long a command looks at what its setting does, before it says what is left to do."""
ANSWER_S = 5.0
"""How long ``reclaim`` waits for the engine."""
_LOOK_S = 0.01

Name = Annotated[str, typer.Argument(help="The instance, as ``kvctl list`` names it.")]
Device = Annotated[str, typer.Option(help="The device, where engines share several.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    """Adds these commands to an app."""
    app.command()(limit)
    app.command(name="limit-percent")(limit_percent)
    app.command()(guarantee)
    app.command()(weight)
    app.command()(reclaim)


def limit(
    name: Name,
    size: Annotated[str, typer.Argument(help="The most that it may hold; none, or such as 20GiB.")],
    device: Device = "",
    as_json: AsJson = False,
) -> None:
    """The most that an instance may hold; 0 drains it down to the page that it cannot do without.

    What it holds above that goes back: cached memory at once, memory in use as requests end.

    Examples:

      kvctl limit chat 20GiB

      kvctl limit chat none
    """
    size_bytes = None if size.lower() == "none" else parse_size(size, "limit")
    _set_limit(name, size_bytes, device, as_json)


def limit_percent(
    name: Name,
    percent: Annotated[float, typer.Argument(min=0, max=100, help="Of the device's capacity.")],
    device: Device = "",
    as_json: AsJson = False,
) -> None:
    """The most that an instance may hold, as a percentage of the device's capacity.

    Examples:

      kvctl limit-percent chat 40

      kvctl limit-percent chat 0 --json
    """
    _set_limit(name, percent, device, as_json)


def guarantee(
    name: Name,
    size: Annotated[str, typer.Argument(help="What it is sure of, such as 8GiB; 0 for nothing.")],
    device: Device = "",
    as_json: AsJson = False,
) -> None:
    """What an instance is sure of, used or not. Others give back for it what they only cache.

    Examples:

      kvctl guarantee chat 8GiB

      kvctl guarantee chat 0
    """
    size_bytes = parse_size(size, "guarantee")
    with _open(device) as ledger:
        _account(ledger, name)
        ledger.set_guarantee(name, size_bytes)
        _wait(lambda: _missing(ledger) == 0)
        _say(ledger, name, "guarantee", format_size(size_bytes), as_json)


def weight(
    name: Name,
    number: Annotated[float, typer.Argument(help="1 to begin with; 2 is twice the part.")],
    device: Device = "",
    as_json: AsJson = False,
) -> None:
    """An instance's part of what guarantees leave open, against the others'.

    Examples:

      kvctl weight chat 3
    """
    with _open(device) as ledger:
        _account(ledger, name)
        ledger.set_weight(name, number)
        _say(ledger, name, "weight", f"{number:g}", as_json)


def reclaim(
    name: Name,
    size: Annotated[str, typer.Argument(help="How much; all that it only caches if not given.")] = (
        ""
    ),
    device: Device = "",
    as_json: AsJson = False,
) -> None:
    """Takes memory back from an instance that it does not use: warm pages, then cached blocks.

    Ends with 3 where the engine did not answer within a few seconds.

    Examples:

      kvctl reclaim chat

      kvctl reclaim chat 4GiB --json | jq .given
    """
    with _open(device) as ledger:
        before = _account(ledger, name)
        wanted = parse_size(size, "reclaim") if size else before.charge
        ledger.ask_back(before.instance, wanted)
        answered = _wait(lambda: _account(ledger, before.instance).asked == 0, ANSWER_S)
        after = _account(ledger, before.instance)
        given = after.reclaimed - before.reclaimed
        # Given is what no block lies on any more; gone, once the worker has unmapped it.
        _wait(lambda: _account(ledger, before.instance).charge <= before.charge - given)
        after = _account(ledger, before.instance)
    result = {"name": after.name, "wanted": wanted, "given": given, "charge": after.charge}
    if as_json:
        typer.echo(json.dumps({**result, "answered": answered}))
    elif answered:
        typer.echo(f"{after.name} gave {format_size(given)} and holds {format_size(after.charge)}")
    else:
        typer.echo(f"{after.name} has not answered within {ANSWER_S:g} s", err=True)
    if not answered:
        raise typer.Exit(NOT_NOW)


def _set_limit(name: str, value: int | float | None, device: str, as_json: bool) -> None:
    with _open(device) as ledger:
        _account(ledger, name)
        # A percentage is a float, a size whole bytes.
        size = int(ledger.capacity * value / 100) if isinstance(value, float) else value
        ledger.set_limit(name, size)
        _wait(lambda: _above(_account(ledger, name)) == 0)
        _say(ledger, name, "limit", "none" if size is None else format_size(size), as_json)


def _above(account: AccountSnapshot) -> int:
    """Bytes that it holds above its limit."""
    if account.limit is None:
        return 0
    return max(0, account.charge - max(account.limit, account.pinned))


def _missing(ledger: Ledger) -> int:
    """Bytes that would have to come back for every account to have what it is sure of."""
    now = ledger.snapshot()
    claims = sum(max(each.charge, each.guarantee, each.pinned) for each in now.accounts)
    return max(0, claims - now.charge - now.free)


def _say(ledger: Ledger, name: str, setting: str, value: str, as_json: bool) -> None:
    account = _account(ledger, name)
    above, missing = _above(account), min(_missing(ledger), account.guarantee)
    if as_json:
        result: dict[str, Any] = {"name": account.name, "charge": account.charge, "above": above}
        result |= {key: getattr(account, key) for key in ("guarantee", "limit", "weight")}
        typer.echo(json.dumps(result))
        return
    words = f"{account.name}: {setting} {value}, holds {format_size(account.charge)}"
    if above:
        words += f"; {format_size(above)} above its limit are in use and go as requests end"
    elif setting == "guarantee" and missing:
        words += f"; {format_size(missing)} of it are in use by others and come as requests end"
    typer.echo(words)


def _wait(condition: Callable[[], bool], limit_s: float = EFFECT_S) -> bool:
    end_s = time.monotonic() + limit_s
    while not (done := condition()) and time.monotonic() < end_s:
        time.sleep(_LOOK_S)
    return done


def _open(device: str) -> Ledger:
    config = Config.from_env()
    found = devices.find(config, device or None)
    return Ledger.open(config.directory, found, create=False)


def _account(ledger: Ledger, name: str) -> AccountSnapshot:
    """The account with this instance or name. Raises InvalidArgumentError naming those there."""
    accounts = ledger.snapshot().accounts
    found = [a for a in accounts if a.instance == name] or [a for a in accounts if a.name == name]
    if len(found) == 1:
        return found[0]
    if found:
        ids = ", ".join(account.instance for account in found)
        raise ConfigError(f"{len(found)} instances are called {name}: expected one of {ids}")
    names = ", ".join(account.name for account in accounts) or "none"
    raise InvalidArgumentError(f"{ledger.device} has no instance {name}; there are: {names}")
