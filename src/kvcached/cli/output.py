"""The forms in which commands answer: aligned columns for people, versioned JSON for programs.

Every JSON document names its own form in ``schema``; kvctl.schema.json describes all of them. A
form may gain fields; where one changes its meaning or goes, the form's version rises.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kvcached.events import Event
from kvcached.snapshot import AccountSnapshot, LedgerSnapshot

VERSION = 1


def document(kind: str, fields: dict[str, Any], indent: int | None = None) -> str:
    """A JSON document of a kind, such as ``list`` or ``setting``."""
    return json.dumps({"schema": f"kvcached.{kind}.v{VERSION}", **fields}, indent=indent)


def ledger_fields(found: LedgerSnapshot) -> dict[str, Any]:
    """Everything that a ledger says, and the sums."""
    fields = {**asdict(found), "charge": found.charge, "free": found.free}
    for fields_of, account in zip(fields["accounts"], found.accounts, strict=True):
        fields_of |= {"alive": account.alive, "above": account.above}
    return fields


def setting_fields(device: str, account: AccountSnapshot) -> dict[str, Any]:
    """An instance and its settings."""
    keys = ("instance", "name", "charge", "guarantee", "limit", "weight", "above")
    return {"device": device, **{key: getattr(account, key) for key in keys}}


def event_document(event: Event, time_s: float) -> str:
    """One line of the event stream."""
    subject = {"device": event.device, "instance": event.instance, "name": event.name}
    fields = {"time_s": round(time_s, 3), "event": event.kind, **subject}
    return document("event", {**fields, "figures": dict(event.figures)})


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned columns, the first one flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines
