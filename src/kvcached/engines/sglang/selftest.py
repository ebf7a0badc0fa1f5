"""Whether this SGLang is what its adapter was made for; see ``kvcached.engines.vllm.selftest``.

What an adapter replaces by name is missed when the seams are installed. What it overrides in a
subclass, or calls, is looked at here, before: a method that has another name now would be
SGLang's own, and an allocator without pages under its slots.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvcached.engines import registry, signatures
from kvcached.errors import EngineError


def check(version: str, expects: Mapping[str, str]) -> None:
    """Compares the parameters of functions with those in the table (``adapter.EXPECTS``)."""
    for name, parameters in expects.items():
        what = signatures.difference(name, signatures.look_up(name), parameters)
        if what is not None:
            raise EngineError(
                f"kvcached does not fit this SGLang {version}: {what}. It was made for SGLang "
                f"{registry.supported('sglang')} as published: install one of these, or a kvcached "
                f"for this one. {registry.OFF}"
            )
