"""How kvcached takes hold of an engine: seams, installed all together or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kvcached.errors import EngineError


@dataclass(frozen=True, slots=True)
class Seam:
    """One attribute of the engine that an adapter replaces.

    ``owner`` is the module or class, ``name`` the attribute; ``replace`` makes the new value from
    the old one. A seam that is not there any more fails the installation.
    """

    owner: Any
    name: str
    replace: Any

    def __str__(self) -> str:
        module = getattr(self.owner, "__module__", None)
        owner = getattr(self.owner, "__qualname__", getattr(self.owner, "__name__", "?"))
        return f"{module}.{owner}.{self.name}" if module else f"{owner}.{self.name}"


class Installation:
    """Seams that are in place; ``uninstall`` puts back what was there. Idempotent."""

    def __init__(self, undo: list[tuple[Seam, Any]]) -> None:
        self._undo = undo

    def uninstall(self) -> None:
        """Restores every attribute, last first."""
        while self._undo:
            seam, old = self._undo.pop()
            setattr(seam.owner, seam.name, old)


def install(seams: Sequence[Seam]) -> Installation:
    """Installs every seam, or none: a missing one restores the others and raises EngineError."""
    undo: list[tuple[Seam, Any]] = []
    installation = Installation(undo)
    for seam in seams:
        try:
            old = vars(seam.owner)[seam.name]
        except KeyError:
            installation.uninstall()
            raise EngineError(
                f"the seam {seam} is not there in this version of the engine. "
                "Unset ENABLE_KVCACHED to run the engine without kvcached."
            ) from None
        undo.append((seam, old))
        setattr(seam.owner, seam.name, seam.replace(old))
    return installation


@contextmanager
def substituted(module: Any, **values: Any) -> Iterator[None]:
    """Other values for a module's names while the block runs, as where a class is constructed."""
    old = {name: vars(module)[name] for name in values}
    vars(module).update(values)
    try:
        yield
    finally:
        vars(module).update(old)
