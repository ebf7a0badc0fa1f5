"""What moving blocks together would save; simulated, for ``bench.fragmentation`` alone.

No engine of ours moves blocks: a step that uses one may be under way, and its contents would have
to be copied. Whether it would pay is measured by doing it in the simulation, where it costs nothing
but the blocks that are counted: high pages that are little used are emptied into the holes of low
ones, which the allocator fills first.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcached.bench.churn import Churn

EMPTY_ENOUGH = 0.5
"""A page is emptied when no more than this part of it is in use."""


@dataclass(slots=True)
class Compactor:
    """Compacts one engine without a prefix cache. ``moved`` counts blocks."""

    engine: Churn
    moved: int = 0

    def work(self) -> None:
        """Empties pages, the highest first, as long as their blocks find room in lower ones."""
        per_page = self.engine.pool.blocks.blocks_per_page
        owners = self._owners()
        used: dict[int, list[int]] = {}
        for block in owners:
            used.setdefault(block // per_page, []).append(block)
        for page in sorted(used, reverse=True):
            if page == 0 or len(used[page]) > EMPTY_ENOUGH * per_page:
                continue
            if not self._empty(page, used[page], owners):
                return

    def _owners(self) -> dict[int, tuple[list[int], int]]:
        """By block in use: the request's list that names it, and where."""
        return {
            block: (request.blocks, index)
            for group in self.engine.running
            for request in group
            for index, block in enumerate(request.blocks)
        }

    def _empty(
        self, page: int, blocks: list[int], owners: dict[int, tuple[list[int], int]]
    ) -> bool:
        """Moves a page's blocks below it, if there is room for all of them."""
        pool = self.engine.pool.blocks
        if pool.free_blocks < len(blocks):
            return False
        places = pool.alloc(len(blocks))
        assert places is not None
        if max(places) // pool.blocks_per_page >= page:
            pool.free(places)
            return False
        for block, place in zip(blocks, places, strict=True):
            names, index = owners[block]
            names[index] = place
        pool.free(blocks)
        self.moved += len(blocks)
        return True
