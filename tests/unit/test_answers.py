"""A cache is part of what an engine works with only while it answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from page_pools import PAGE, PER_PAGE, Instance

from kvcached import answers
from kvcached.answers import LEAST_PART, WINDOW_BLOCKS, Answers
from kvcached.ledger import Ledger

PAGES = 20


def test_a_cache_is_judged_by_whole_windows() -> None:
    cache = Answers()
    assert cache.enough(0, WINDOW_BLOCKS - 1), "at first it is taken to answer"
    assert not cache.enough(0, WINDOW_BLOCKS)
    assert not cache.enough(WINDOW_BLOCKS - 1, WINDOW_BLOCKS), "the window is not over"
    assert cache.enough(WINDOW_BLOCKS, WINDOW_BLOCKS)
    least = round(LEAST_PART * WINDOW_BLOCKS)
    assert cache.enough(WINDOW_BLOCKS + least, 2 * WINDOW_BLOCKS - least)
    assert not cache.enough(WINDOW_BLOCKS + 2 * least - 1, 3 * WINDOW_BLOCKS - 2 * least + 1)


@pytest.mark.parametrize(("hits", "pages"), [(0, 15), (4, 15), (5, 9)])
def test_a_busy_neighbour_gives_what_answers_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hits: int, pages: int
) -> None:
    monkeypatch.setattr(answers, "WINDOW_BLOCKS", 40)
    with Ledger.open(tmp_path / "ledger", "host:pages", PAGES * PAGE) as ledger:
        one, two = (Instance(ledger, name, pages=PAGES) for name in ("one", "two"))
        held = one.alloc(3 + 18 * PER_PAGE)
        one.carry()
        for _ in range(hits):
            one.blocks.free(held[-1:], cached=True)
            one.blocks.touch(held[-1:])
        one.blocks.free(held[2 * PER_PAGE + 3 :], cached=True)  # 2 pages and the first in use
        one.pool.publish()
        assert not two.pool.ensure(3 + 15 * PER_PAGE)
        assert one.pool.relieve() == pages * PAGE, "all that is wanted, or down to its share"
        one.carry()
        assert two.pool.ensure(3 + pages * PER_PAGE)
        one.check()
        two.check()
