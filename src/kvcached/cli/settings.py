"""``kvctl limit``, ``limit-percent``, ``guarantee``, ``weight``, ``reclaim``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from kvcached import control
from kvcached.cli.edge import NOT_NOW, complain, one_line
from kvcached.cli.options import AsJson, Device, Name
from kvcached.cli.output import document, setting_fields
from kvcached.control import Effect, Pool, open_pool
from kvcached.units import format_size, parse_share


def register(app: typer.Typer) -> None:
    """Adds these commands to an app."""
    app.command()(limit)
    app.command(name="limit-percent")(limit_percent)
    app.command()(guarantee)
    app.command()(weight)
    app.command()(reclaim)


def limit(
    name: Name,
    size: Annotated[
        str, typer.Argument(help="The most that it may hold: none, or such as 20GiB or 40%.")
    ],
    device: Device = "",
    as_json: AsJson = False,
) -> None:
    """The most that an instance may hold; 0 drains it down to the page that it cannot do without.

    What it holds above that goes back: cached memory at once, memory in use as requests end. A
    request that alone needs more than that fails, and its client is told both numbers.

    Examples:

      kvctl limit chat 20GiB

      kvctl limit chat 40%

      kvctl limit chat none
    """
    amount = None if size.lower() == "none" else size
    _change("limit", device, as_json, lambda pool: pool.set_limit(name, amount))


def limit_percent(
    name: Name,
    percent: Annotated[str, typer.Argument(help="Of the device's capacity, from 0 to 100.")],
    device: Device = "",
    as_json: AsJson = False,
) -> None:
    """The most that an instance may hold, as a percentage of the device's capacity.

    Examples:

      kvctl limit-percent chat 40

      kvctl limit-percent chat 0 --json
    """
    amount = f"{percent.strip().removesuffix('%')}%"
    parse_share(amount, "limit")  # a wrong number is said before a missing ledger is
    _change("limit", device, as_json, lambda pool: pool.set_limit(name, amount))


def guarantee(
    name: Name,
    size: Annotated[
        str, typer.Argument(help="What it is sure of, such as 8GiB or 25%; 0 for nothing.")
    ],
    device: Device = "",
    as_json: AsJson = False,
) -> None:
    """What an instance is sure of, used or not. Others give back for it what they only cache.

    Examples:

      kvctl guarantee chat 8GiB

      kvctl guarantee chat 0
    """
    _change("guarantee", device, as_json, lambda pool: pool.set_guarantee(name, size))


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
    _change("weight", device, as_json, lambda pool: pool.set_weight(name, number))


def reclaim(
    name: Name,
    size: Annotated[
        str, typer.Argument(help="How much, such as 4GiB; all that it only caches if not given.")
    ] = "",
    device: Device = "",
    as_json: AsJson = False,
) -> int:
    """Takes memory back from an instance that it does not use: warm pages, then cached blocks.

    Ends with 3 where the engine did not answer within a few seconds.

    Examples:

      kvctl reclaim chat

      kvctl reclaim chat 4GiB --json | jq .given
    """
    with open_pool(device or None) as pool:
        done = pool.reclaim(name, size or None, control.ANSWER_S)
        account, where = done.account, pool.device
    if as_json:
        given = {"wanted": done.wanted, "given": done.given, "answered": done.answered}
        typer.echo(document("reclaim", {**setting_fields(where, account), **given}))
    elif done.answered:
        gave, holds = format_size(done.given), format_size(account.charge)
        typer.echo(f"{one_line(account.name)} gave {gave} and holds {holds}")
    else:
        complain("kvctl", f"{account.name} has not answered within {control.ANSWER_S:g} s")
    return 0 if done.answered else NOT_NOW


def _change(setting: str, device: str, as_json: bool, change: Callable[[Pool], Effect]) -> None:
    """Changes a setting and says what that has done."""
    with open_pool(device or None) as pool:
        effect = change(pool)
        where = pool.device
    if as_json:
        missing = {"missing": effect.missing}
        typer.echo(document("setting", {**setting_fields(where, effect.account), **missing}))
    else:
        typer.echo(_words(setting, effect))


def _words(setting: str, effect: Effect) -> str:
    account = effect.account
    value = getattr(account, setting)
    said = "none"
    if value is not None:
        said = f"{value:g}" if setting == "weight" else format_size(value)
    words = f"{one_line(account.name)}: {setting} {said}, holds {format_size(account.charge)}"
    if effect.above:
        above = format_size(effect.above)
        words += f"; {above} above its limit are in use and go as requests end"
    elif setting == "guarantee" and effect.missing:
        missing = format_size(effect.missing)
        words += f"; {missing} of it are in use by others and come as requests end"
    return words
