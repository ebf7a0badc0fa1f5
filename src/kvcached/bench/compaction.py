"""What moving blocks together would save; simulated, for ``bench.fragmentation`` alone.

No engine of ours moves blocks: a step that uses one may be under way, and its contents would have
to be copied. Whether it would pay is measured by doing it in the simulation, where it costs nothing
but the blocks that are counted: the pages that are used least are emptied into the holes of those
that are used most, which the allocator fills first.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcached.bench.churn import Churn

EMPTY_ENOUGH = 0.75
"""A page is emptied when no more than this part of it is in use."""


@dataclass(slots=True)
class Compactor:
    """Compacts one engine without a prefix cache. ``moved`` counts blocks."""

    engine: Churn
    moved: int = 0

    def work(self) -> None:
        """Empties pages, the least used first, as long as their blocks find room on others."""
        per_page = self.engine.pool.blocks.blocks_per_page
        owners = self._owners()
        used: dict[int, list[int]] = {}
        for block in owners:
            used.setdefault(block // per_page, []).append(block)
        for page in sorted(used, key=lambda one: (len(used[one]), -one)):
            if page == 0:
                continue
            if len(used[page]) > EMPTY_ENOUGH * per_page:
                return
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
        """Moves a page's blocks, one by one, to wherever they fit most closely, if all of them find
        room on other pages that are in use.
        """
        pool = self.engine.pool.blocks
        places: list[int] = []
        while len(places) < len(blocks):
            place = pool.alloc(1) if pool.free_blocks else None
            if place is None:
                break
            places += place
            other = place[0] // pool.blocks_per_page
            if other == page or pool.used_in(other) == 1:  # it was vacant
                break
        else:
            for block, place_ in zip(blocks, places, strict=True):
                names, index = owners[block]
                names[index] = place_
            pool.free(blocks)
            self.moved += len(blocks)
            return True
        pool.free(places)
        return False
