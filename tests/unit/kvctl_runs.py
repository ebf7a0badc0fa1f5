"""What a run of ``kvctl`` says; see also the fixture ``run``, which needs no process."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema

from kvcached.cli import kvctl

SCHEMA_FILE = Path(kvctl.__file__).with_name("kvctl.schema.json")


@functools.cache
def validator() -> Any:
    schema = json.loads(SCHEMA_FILE.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


class Ran:
    """What a run has said; JSON is checked against the schema whenever it is read."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return self._valid(self.out)

    @property
    def lines(self) -> list[Any]:
        return [self._valid(line) for line in self.out.splitlines()]

    @staticmethod
    def _valid(text: str) -> Any:
        found = json.loads(text)
        validator().validate(found)
        return found


Run = Callable[..., Ran]


def spawn(*arguments: str, **options: Any) -> Ran:
    """Runs it in a process of its own, where starting it is the point."""
    command = [sys.executable, "-m", "kvcached.cli.kvctl", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, **options)
    return Ran(done.returncode, done.stdout, done.stderr)
