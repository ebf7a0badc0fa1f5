"""Whether functions of an engine take what an adapter counts on."""

from __future__ import annotations

import importlib
import inspect
from typing import Any


def look_up(name: str) -> Any:
    """What ``module:attribute.attribute`` names; None where it is not there."""
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ImportError:
        return None
    for attribute in path.split("."):
        found = getattr(found, attribute, None)
    return found


def speaking(base: type, name: str, after: type | None = None) -> Any:
    """The method of a class, or of the nearest base that does not pass on whatever it is given
    (``AsyncScheduler.__init__(*args, **kwargs)`` takes what ``Scheduler.__init__`` takes); None
    where there is none. Bases up to ``after`` are left out.
    """
    bases = base.__mro__
    for owner in bases[bases.index(after) + 1 if after else 0 :]:
        found = owner.__dict__.get(name)
        if found is not None and rendered(found) != "self, *args, **kwargs":
            return found
    return None


def difference(name: str, found: Any, parameters: str) -> str | None:
    """What is wrong with the function that was found under a name, in words; None where it takes
    ``parameters``, as ``rendered`` writes them.
    """
    if found is None or _only_declared(found):
        return f"{name} is not there"
    has = rendered(found)
    if has != parameters:
        return f"{name} takes ({has}), and kvcached counts on ({parameters})"
    return None


def _only_declared(function: Any) -> bool:
    """Whether it is a base class's word that there should be such a method."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return getattr(function, "__isabstractmethod__", False) or (
        code is not None and code.co_names == ("NotImplementedError",)
    )


def rendered(function: Any) -> str:
    """The parameters of a function: ``=`` for a default."""
    words, after_star = [], False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            after_star = True
            words.append(f"*{parameter.name}")
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not after_star:
            after_star = True
            words.append("*")
        stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        default = "" if parameter.default is parameter.empty else "="
        words.append(f"{stars}{parameter.name}{default}")
    return ", ".join(words)
