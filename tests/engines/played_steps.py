"""A scheduler's step over a page pool and its mapper, for programs without an engine."""

from __future__ import annotations

from kvcached.cache import PageMapper
from kvcached.pages import PagePool


def take_step(pages: PagePool, mapper: PageMapper) -> None:
    """Commands leave, as with every step of the scheduler."""
    pages.settle(idle=False)
    commands = pages.take_commands()
    if commands is not None:
        mapper.apply(commands)
        assert mapper.drain(5)  # so that the same program has the same memory every time
    pages.publish()
