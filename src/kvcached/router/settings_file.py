"""The settings file: YAML whose errors name the file, the line and the field.

Beyond YAML: keys that begin with `x-` at the top are left to the writer (for anchors), paths are
relative to the file, and variables of an environment are taken as they are written (`on` is "on").
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, SecretStr, ValidationError

from kvcached.errors import ConfigError
from kvcached.router.settings import ServeSettings, Where
from kvcached.router.yaml_lines import Document, YamlProblem, read

_ENVIRONMENT = "environment"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong. ``str`` is the line that people see."""

    file: str
    line: int
    field: str
    text: str

    def __str__(self) -> str:
        field = f"{self.field}: " if self.field else ""
        return f"{self.file}:{self.line}: {field}{self.text}"


class SettingsError(ConfigError):
    """A settings file is wrong; ``problems`` are all that were found, in the file's order."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda problem: problem.line))
        super().__init__("\n".join(map(str, self.problems)))


@dataclass(frozen=True, slots=True)
class SettingsFile:
    """Settings together with where each of them stands."""

    path: Path
    settings: ServeSettings
    document: Document

    def problem(self, where: Where, text: str) -> Problem:
        """Something found wrong later, in the field that ``where`` leads to."""
        return _problem(self.path, self.document, where, text)


def load(path: Path, environment: Mapping[str, str]) -> SettingsFile:
    """Reads a file; ``environment`` is where `env:` keys are looked up. Raises SettingsError, or
    OSError where the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SettingsError([Problem(str(path), 1, "", f"is not UTF-8: {error.reason}")]) from None
    try:
        document = read(text, verbatim=lambda where: _ENVIRONMENT in where[-2:-1])
    except YamlProblem as error:
        problem = Problem(str(path), error.line, field_name(error.where), str(error))
        raise SettingsError([problem]) from None
    except yaml.YAMLError as error:
        raise SettingsError([_syntax(path, error)]) from None
    data = document.data
    if not isinstance(data, dict):
        text = "expected settings such as `models:`"
        raise SettingsError([Problem(str(path), 1, "", text)])
    try:
        settings = ServeSettings.model_validate(data)
    except ValidationError as error:
        raise SettingsError(list(_problems(path, document, error))) from None
    settings, missing = _resolve(settings, path.parent, environment)
    if missing:
        raise SettingsError([_problem(path, document, *each) for each in missing])
    return SettingsFile(path, settings, document)


def field_name(where: Where) -> str:
    """`models[1].limit`."""
    text = ""
    for part in where:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _syntax(path: Path, error: yaml.YAMLError) -> Problem:
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or str(error)
    return Problem(str(path), mark.line + 1 if mark else 1, "", f"is not YAML: {what}")


def _problem(path: Path, document: Document, where: Where, text: str) -> Problem:
    return Problem(str(path), document.line(where), field_name(where), text)


def _problems(path: Path, document: Document, error: ValidationError) -> Iterator[Problem]:
    for each in error.errors():
        context = each.get("ctx", {})
        if each["type"] == "misfit":
            for where, text in context["problems"]:
                yield _problem(path, document, tuple(where), text)
            continue
        where, text = tuple(each["loc"]), _text(each)
        if each["type"] == "extra_forbidden":
            text = f"there is no such field{_nearest(where)}"
        yield _problem(path, document, where, text)


def _text(error: Any) -> str:
    """Pydantic's words, in the form of ours; no value of a secret."""
    if error["type"] == "missing":
        return "is missing"
    if error["type"] == "path_type":
        return "expected a path"
    text: str = error["msg"].replace("Input should be", "expected").replace("List should", "should")
    given = error["input"]
    secret = "key" in error["loc"][-1:]
    if isinstance(given, str | int | float | None) and not secret:
        text += f", not {given!r}"
    return text


def _nearest(where: Where) -> str:
    names = list(_fields_of(ServeSettings, where[:-1]))
    near = difflib.get_close_matches(str(where[-1]), names, n=1)
    return f"; did you mean {near[0]}?" if near else f"; there are: {', '.join(names)}"


def _fields_of(model: Any, where: Where) -> Mapping[str, Any]:
    """The fields of the settings that ``where`` leads to."""
    for part in where:
        if isinstance(part, str):
            model = _model_in(model.model_fields[part].annotation)
    fields: Mapping[str, Any] = model.model_fields
    return fields


def _model_in(annotation: Any) -> Any:
    """The settings class in an annotation such as ``list[ModelSettings]``."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    found = (_model_in(inner) for inner in typing.get_args(annotation))
    return next((model for model in found if model is not None), None)


def _resolve(
    settings: ServeSettings, folder: Path, environment: Mapping[str, str]
) -> tuple[ServeSettings, list[tuple[Where, str]]]:
    """Paths as seen from the file's folder, and keys from where they stand."""
    missing: list[tuple[Where, str]] = []
    keys = []
    for number, key in enumerate(settings.api_keys):
        try:
            secret = _secret(key.key.get_secret_value(), folder, environment)
        except ConfigError as error:
            missing.append((("api_keys", number, "key"), str(error)))
            continue
        keys.append(key.model_copy(update={"key": SecretStr(secret)}))
    models = []
    for number, model in enumerate(settings.models):
        update: dict[str, Any] = {}
        if model.python is not None:
            update["python"] = _path(model.python, folder)
        if model.source.startswith((".", "/", "~")):
            source = _path(Path(model.source), folder)
            update["model"] = str(source)
            if settings.hosts is None and not source.exists():
                missing.append((("models", number, "model"), f"there is no {source}"))
        models.append(model.model_copy(update=update))
    changes: dict[str, Any] = {"api_keys": keys, "models": models}
    if settings.logs.folder is not None:
        place = {"folder": _path(settings.logs.folder, folder)}
        changes["logs"] = settings.logs.model_copy(update=place)
    return settings.model_copy(update=changes), missing


def _path(path: Path, folder: Path) -> Path:
    """Absolute; symbolic links stay, since a virtual environment's Python is one."""
    return folder.absolute() / path.expanduser()


def _secret(text: str, folder: Path, environment: Mapping[str, str]) -> str:
    """The key that a reference leads to. Raises ConfigError, without the key."""
    kind, _, place = text.partition(":")
    if kind == "env":
        secret = environment.get(place, "")
        where = f"the variable {place}"
    elif kind == "file":
        where = f"the file {_path(Path(place), folder)}"
        try:
            secret = _path(Path(place), folder).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where} cannot be read: {error}") from None
    else:
        secret, where = text, "the key"
    if not secret:
        raise ConfigError(f"{where} is empty or not set")
    if not (secret.isascii() and secret.isprintable()) or " " in secret:
        raise ConfigError(f"{where} holds characters that no HTTP header can: expected ASCII")
    return secret
