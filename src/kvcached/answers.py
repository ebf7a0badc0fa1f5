"""Whether a prefix cache answers: only then is it part of what an engine works with."""

from __future__ import annotations

WINDOW_BLOCKS = 4096  # asked for, before it is judged anew
LEAST_PART = 1 / 16  # of them, answered from the cache


class Answers:
    """Looks at the blocks that requests asked for, a window at a time; see ``policy.Standing``.

    The cache of a working engine counts as wanted up to its fair share, so that a neighbour with
    an endless queue does not cost it its hits. A cache that answers nothing has none to lose: what
    requests left behind is then memory like any other, and goes to whoever has requests waiting.
    Until a window has passed, a cache is taken to answer.
    """

    def __init__(self) -> None:
        self._hits = self._asked = 0  # when the window began
        self._enough = True

    def enough(self, hits: int, misses: int) -> bool:
        """Whether the last whole window had hits enough. Takes the blocks so far that the cache
        answered, and those that had to be filled.
        """
        asked = hits + misses - self._asked
        if asked >= WINDOW_BLOCKS:
            self._enough = hits - self._hits >= LEAST_PART * asked
            self._hits, self._asked = hits, hits + misses
        return self._enough
