"""YAML as data together with the line of every value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

Where = tuple[str | int, ...]

MAX_VALUES = 100_000
"""Anchors can make a small file enormous."""


class YamlProblem(Exception):
    """YAML that is not settings: a key twice, a key that is no text, anchors without end."""

    def __init__(self, text: str, line: int, where: Where = ()) -> None:
        super().__init__(text)
        self.line, self.where = line, where


@dataclass(frozen=True, slots=True)
class Document:
    """What a file says, and on which line, counted from 1."""

    data: Any
    lines: dict[Where, int]

    def line(self, where: Where) -> int:
        """The line of a value; of what it would stand in, where it is missing."""
        while where not in self.lines:
            where = where[:-1]
        return self.lines[where]


def read(text: str, verbatim: Callable[[Where], bool]) -> Document:
    """Reads one document. Scalars at places for which ``verbatim`` holds stay text as written.

    Raises YamlProblem, or yaml.YAMLError for what is no YAML.
    """
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        builder = _Builder(loader, verbatim)
        data = None if root is None else builder.value(root, ())
        builder.lines.setdefault((), 1)
        return Document(data, builder.lines)
    finally:
        loader.dispose()


class _Builder:
    def __init__(self, loader: Any, verbatim: Callable[[Where], bool]) -> None:
        self.lines: dict[Where, int] = {}
        self._loader = loader
        self._verbatim = verbatim
        self._inside: list[int] = []  # the nodes around the current one: an alias may lead back
        self._flat: set[int] = set()

    def value(self, node: yaml.Node, where: Where) -> Any:
        line = node.start_mark.line + 1
        self.lines.setdefault(where, line)
        if id(node) in self._inside or len(self.lines) > MAX_VALUES:
            raise YamlProblem("an anchor that holds itself, or too many values", line)
        self._inside.append(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, where)
            if isinstance(node, yaml.SequenceNode):
                return [self.value(item, (*where, n)) for n, item in enumerate(node.value)]
            if self._verbatim(where):
                return node.value
            return self._loader.construct_object(node)
        finally:
            self._inside.pop()

    def _mapping(self, node: yaml.MappingNode, where: Where) -> dict[str, Any]:
        self._refuse_twice(node, where)
        self._loader.flatten_mapping(node)  # what `<<` brings stands first: own keys win
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key, str):
                raise YamlProblem("expected a name as key", key_node.start_mark.line + 1)
            place = (*where, key)
            self.lines[place] = key_node.start_mark.line + 1
            data[key] = self.value(value_node, place)
        return data

    def _refuse_twice(self, node: yaml.MappingNode, where: Where) -> None:
        if id(node) in self._flat:  # an alias led here before, and merged keys stand in it now
            return
        self._flat.add(id(node))
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen:
                text = f"is there already, on line {seen[key]}"
                raise YamlProblem(text, line, (*where, key))
            seen[key] = line
