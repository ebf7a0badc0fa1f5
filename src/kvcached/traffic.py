"""How many pages are worth mapping before a step needs them."""

from __future__ import annotations

LOOK_AHEAD = 2.0  # steps: one to carry the command, one to map while it runs
_FORGET = 0.95  # of a peak, kept from one observation to the next


class Traffic:
    """How many pages come into use, and go out of it, at once: peaks that are forgotten slowly.

    They rise with a burst at once and fall to half within 14 observations (7 steps: a step
    observes when it has scheduled, and when it has freed). A mean would be late for the burst,
    and too small for prefills, which come a few at a time.
    """

    def __init__(self, pages_in_use: int) -> None:
        self._before = pages_in_use
        self._arrivals = 0.0
        self._departures = 0.0

    def observe(self, pages_in_use: int) -> None:
        """Takes the number of pages with contents as it is now."""
        more = pages_in_use - self._before
        self._before = pages_in_use
        self._arrivals = max(float(more), self._arrivals * _FORGET)
        self._departures = max(float(-more), self._departures * _FORGET)

    def worth_warming(self, high: int) -> int:
        """Warm pages for the next steps, of ``high`` at most.

        What is about to come free serves as well, and must not lift the sum above ``high``: pages
        would be mapped and unmapped in turn.
        """
        return min(round(self._arrivals * LOOK_AHEAD), high - round(self._departures))
