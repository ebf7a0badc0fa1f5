"""SGLang's own allocators over blocks that come with memory.

What SGLang computes stays SGLang's: which slots a request gets of a page, how frees are grouped.
Its list of free blocks holds nothing between two calls. Before an allocation it is filled with
exactly the blocks that the call takes, and after a free it holds those that came back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from kvcached.engines.sglang.engine import ElasticEngine
from kvcached.engines.sglang.slots import Slots
from kvcached.errors import EngineError


class ElasticAllocator:
    """What kvcached adds to an allocator class of SGLang; mixed in before it by ``elastic``.

    Every method runs on the scheduler's thread.
    """

    FREE_LIST = "free_pages"  # the attribute that lists free blocks

    size: int
    page_size: int
    device: Any
    slots: Slots
    engine: ElasticEngine

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        build: Callable[..., None] = super().__init__
        arguments = inspect.signature(build).bind(*args, **kwargs).arguments
        self.engine = ElasticEngine.of(arguments["kvcache"], arguments["size"])
        self.slots = self.engine.slots
        build(*args, **kwargs)
        if arguments.get("need_sort"):
            raise EngineError("kvcached: SGLang wants sorted slots: not supported yet")

    def available_size(self) -> int:
        return self.slots.available() * self.page_size

    def get_all_free_pages(self) -> torch.Tensor:
        """All blocks that are not in use, for SGLang's checks."""
        return torch.tensor(self.slots.unused_ids(), dtype=torch.int64, device=self.device)

    def clear(self) -> None:
        super().clear()  # type: ignore[misc]
        self._fill([])
        self.slots.clear()

    def free(self, *args: Any, **kwargs: Any) -> None:
        super().free(*args, **kwargs)  # type: ignore[misc]
        self._take_back()

    def free_group_end(self) -> None:
        super().free_group_end()  # type: ignore[misc]
        self._take_back()

    def _fill(self, ids: list[int]) -> None:
        setattr(self, self.FREE_LIST, torch.tensor(ids, dtype=torch.int64, device=self.device))

    def _take_back(self) -> None:
        came: torch.Tensor = getattr(self, self.FREE_LIST)
        if came.numel():
            self._fill([])
            self.slots.free(came.tolist())

    def _with_blocks(self, count: int, take: Callable[[], Any]) -> Any:
        """SGLang's own allocation of exactly ``count`` blocks; None where memory is short."""
        ids = self.slots.alloc(count)
        if ids is None:
            return None
        self._fill(ids)
        taken = take()
        left = len(getattr(self, self.FREE_LIST))
        if taken is None or left:
            raise EngineError(
                f"kvcached: SGLang took {count - left} blocks where {count} were expected"
            )
        return taken


class ElasticTokenAllocator(ElasticAllocator):
    """A block is a slot."""

    def alloc(self, need_size: int) -> Any:
        take = super().alloc  # type: ignore[misc]
        return self._with_blocks(need_size, lambda: take(need_size))


class ElasticPagedAllocator(ElasticAllocator):
    """A block is a page of SGLang's."""

    def alloc(self, need_size: int) -> Any:
        take = super().alloc  # type: ignore[misc]
        return self._with_blocks(need_size // self.page_size, lambda: take(need_size))

    def alloc_extend(self, *args: Any, **kwargs: Any) -> Any:
        take = super().alloc_extend  # type: ignore[misc]
        lens = inspect.signature(take).bind(*args, **kwargs).arguments
        # On the host where SGLang has them there: asking the device would wait for it.
        before = lens.get("prefix_lens_cpu", lens["prefix_lens"])
        after = lens.get("seq_lens_cpu", lens["seq_lens"])
        blocks = self._blocks(after) - self._blocks(before)
        return self._with_blocks(blocks, lambda: take(*args, **kwargs))

    def alloc_decode(self, *args: Any, **kwargs: Any) -> Any:
        take = super().alloc_decode  # type: ignore[misc]
        lens = inspect.signature(take).bind(*args, **kwargs).arguments
        after = lens.get("seq_lens_cpu", lens["seq_lens"])
        blocks = int(((after - 1) % self.page_size == 0).sum())
        return self._with_blocks(blocks, lambda: take(*args, **kwargs))

    def _blocks(self, lens: torch.Tensor) -> int:
        return int(((lens + self.page_size - 1) // self.page_size).sum())

    def _release_page_ids(self, *page_ids: torch.Tensor) -> None:
        """Where frees of SGLang 0.5.23 meet that do not come by way of ``free``."""
        super()._release_page_ids(*page_ids)  # type: ignore[misc]
        self._take_back()


def elastic(mixin: type[ElasticAllocator], base: type, free_list: str = "free_pages") -> type:
    """The elastic subclass of an allocator class."""
    return type(f"Elastic{base.__name__}", (mixin, base), {"FREE_LIST": free_list})
