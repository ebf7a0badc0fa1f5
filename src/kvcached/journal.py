"""Noteworthy events in the engine's own log: a line each, at the level that they deserve.

They are the same that ``kvctl watch --events`` tells (``kvcached.events``), seen by the thread of
an engine that waits for pressure anyway, at most once a second. Of other instances only what
changes the picture is logged: that they come, go or die. On a GPU the first look also compares
what the kernel says: processes that use another ledger for the same GPU are warned of.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable

from kvcached import strangers
from kvcached.errors import LedgerError
from kvcached.events import Event, between
from kvcached.ledger import Ledger

logger = logging.getLogger(__name__)

LEAST_S = 1.0
"""Between two looks: what happens meanwhile is one line with its sum."""

LEVELS = {
    "joined": logging.INFO,
    "ready": logging.DEBUG,
    "asleep": logging.INFO,
    "awake": logging.INFO,
    "left": logging.INFO,
    "died": logging.WARNING,
    "reaped": logging.INFO,
    "limit": logging.INFO,
    "guarantee": logging.INFO,
    "weight": logging.INFO,
    "capacity": logging.INFO,
    "refused": logging.INFO,
    "reclaim": logging.INFO,
    "set aside": logging.INFO,
    "waited": logging.DEBUG,
    "ledger": logging.DEBUG,
}
_OF_OTHERS = frozenset({"joined", "left", "died", "reaped", "set aside"})


class Journal:
    """The log of one instance on one device. One thread at a time."""

    def __init__(
        self, ledger: Ledger, instance: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ledger, self._instance, self._clock = ledger, instance, clock
        self._last = ledger.snapshot()
        self._looked_s = clock()
        # Whether nobody needs looking for who uses another ledger. Host memory has as many as there
        # are folders, and reading every process's mappings costs some milliseconds.
        self._alone = ledger.device.startswith("host:")

    @property
    def due(self) -> bool:
        """Whether a look would be one, the last having been long enough ago."""
        return self._clock() - self._looked_s >= LEAST_S

    def look(self) -> None:
        """Logs what has happened since the last look, unless that was just now."""
        if not self.due:
            return
        self._looked_s = self._clock()
        if not self._alone:
            self._alone = True
            self._warn_of_other_ledgers()
        try:
            before, self._last = self._last, self._ledger.snapshot()
        except LedgerError:  # closed, or cut: who uses the ledger says so
            return
        for event in between(before, self._last):
            if self._concerns(event):
                logger.log(LEVELS[event.kind], "kvcached: %s", event)

    def _warn_of_other_ledgers(self) -> None:
        """Once: it reads the mappings of every process that this one may look at."""
        for each in strangers.mapped_ledgers()[0]:
            if each.file_name == self._ledger.path.name and os.getpid() not in each.pids:
                logger.warning(
                    "kvcached: processes %s use another ledger for %s, %s beside %s: both lend all "
                    "of its memory (containers must mount one folder; see kvcached doctor)",
                    ", ".join(map(str, each.pids)),
                    self._ledger.device,
                    each.path,
                    self._ledger.path,
                )

    def _concerns(self, event: Event) -> bool:
        return not event.instance or event.instance == self._instance or event.kind in _OF_OTHERS
