"""Whether this vLLM is what its adapter was made for, and whether its KV cache really is elastic.

Runs in each of the engine's own processes, where it takes milliseconds: signatures when kvcached
takes hold of a class, attributes when an object is built, the KV cache's addresses when it is
allocated, and the pages when the first step arrives. What does not fit ends the engine with a
message: an engine that only seems to be elastic is worse than one that does not start.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

import vllm

from kvcached.cache import PageMapper
from kvcached.engines import registry, signatures
from kvcached.engines.vllm import adapter
from kvcached.errors import EngineError
from kvcached.vmm_ops import Arena


def check_front(expects: ModuleType) -> None:
    """Checks what kvcached replaces or calls in every process (``expects.FRONT``)."""
    for name, parameters in expects.FRONT.items():
        _check(name, signatures.look_up(name), parameters)


def check_base(kind: str, base: type) -> None:
    """Checks a class before it is subclassed (``kind``: worker or scheduler), and what belongs to
    it. A name without a module is a method of ``base``.
    """
    expects = adapter.current().expects
    for name, parameters in (expects.SCHEDULER if kind == "scheduler" else expects.WORKER).items():
        if ":" in name:
            _check(name, signatures.look_up(name), parameters)
        else:
            owner = f"{base.__module__}:{base.__qualname__}"
            _check(f"{owner}.{name}", signatures.speaking(base, name), parameters)


def check_built(**objects: Any) -> None:
    """Checks that objects have the attributes that are relied on (``expects.ATTRIBUTES``)."""
    expects = adapter.current().expects
    for kind, built in objects.items():
        owner = f"{type(built).__module__}:{type(built).__qualname__}"
        for name in expects.ATTRIBUTES[kind]:
            if not hasattr(built, name):
                raise _changed(f"{owner}.{name} is not there")


def check_tensors(kv_caches: Any, arena: Arena) -> None:
    """Checks that every tensor that the model runner keeps as KV cache lies in the arena."""
    tensors = list(_tensors(kv_caches))
    outside = [t for t in tensors if not 0 <= t.data_ptr() - arena.address < arena.size]
    if outside or not tensors:
        raise _changed(
            f"of {len(tensors)} tensors of the model runner's KV cache, {len(outside)} do not lie "
            "where kvcached maps memory"
        )


def check_mapped(blocks: Iterable[int], mapper: PageMapper) -> bool:
    """Checks that the blocks of a step lie on pages that are really mapped; False where the step
    brings none.
    """
    per_page = mapper.layout.blocks_per_page
    pages = sorted({block // per_page for block in blocks})
    if not pages:
        return False
    missing = [page for page in pages if not mapper.arena.is_mapped(page)]
    held = mapper.arena.created_bytes()
    if missing or held < len(pages) * mapper.layout.page_bytes:
        raise _changed(
            f"the first step uses pages {pages}, of which {missing or 'none'} are not mapped, and "
            f"{held} bytes exist"
        )
    return True


def _tensors(kv_caches: Any) -> Iterator[Any]:
    """The tensors in lists and dictionaries of them."""
    if isinstance(kv_caches, Mapping):
        kv_caches = list(kv_caches.values())
    if isinstance(kv_caches, list | tuple):
        for each in kv_caches:
            yield from _tensors(each)
    else:
        yield kv_caches


def _check(name: str, found: Any, parameters: str) -> None:
    what = signatures.difference(name, found, parameters)
    if what is not None:
        raise _changed(what)


def _changed(what: str) -> EngineError:
    return EngineError(
        f"kvcached does not fit this vLLM {vllm.__version__}: {what}. It was made for vLLM "
        f"{registry.supported('vllm')} as published: install one of these, or a kvcached for this "
        f"one. {registry.OFF}"
    )
