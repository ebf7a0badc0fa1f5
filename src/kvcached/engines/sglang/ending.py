"""The processes of an SGLang engine end together, whichever dies first.

A server's process, its scheduler and its detokenizer hold each other's work: one that outlives the
others keeps memory for nobody. SGLang itself notices a child that raised, not one that was killed.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

from kvcached import watch
from kvcached.engines.base import Seam

# A server gets this long to answer its clients with an error.
FAREWELL_S = 0.15

_serving: ContextVar[bool] = ContextVar("kvcached_sglang_serving", default=False)


def child_seams(detokenizer: Any) -> Sequence[Seam]:
    """What is replaced in SGLang's module of the detokenizer."""
    return (Seam(detokenizer.DetokenizerManager, "__init__", _end_with_parent),)


def _end_with_parent(original: Any) -> Any:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        watch.end_with_parent()
        original(self, *args, **kwargs)

    return __init__


def server_seams(server: Any) -> Sequence[Seam]:
    """What is replaced in SGLang's module of the server."""
    # A function of its own until 0.4, of the engine since.
    launcher = server if "_launch_subprocesses" in vars(server) else server.Engine
    return (
        Seam(server, "launch_server", _mark_serving),
        Seam(launcher, "_launch_subprocesses", _follow_children),
    )


def _mark_serving(original: Any) -> Any:
    @functools.wraps(original)
    def launch_server(*args: Any, **kwargs: Any) -> Any:
        token = _serving.set(True)
        try:
            return original(*args, **kwargs)
        finally:
            _serving.reset(token)

    return launch_server


def _follow_children(original: Any) -> Any:
    """A server ends with its children. The process of a program that uses an engine as a library
    is that program's own, and SGLang ends the children there on request.
    """
    call = original.__func__ if isinstance(original, classmethod) else original

    @functools.wraps(call)
    def _launch_subprocesses(*args: Any, **kwargs: Any) -> Any:
        launched = call(*args, **kwargs)
        if _serving.get():
            children = [child.pid for child in multiprocessing.active_children()]
            watch.end_with([pid for pid in children if pid is not None], grace_s=FAREWELL_S)
        return launched

    return classmethod(_launch_subprocesses) if call is not original else _launch_subprocesses
