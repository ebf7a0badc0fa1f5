"""What an engine's pressure thread does beside waking it: others' rows, others' memory, the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

from kvcached import foreign
from kvcached.errors import LedgerBusyError, LedgerError, UnavailableError
from kvcached.foreign import Memory
from kvcached.journal import Journal
from kvcached.ledger import Account, Ledger

logger = logging.getLogger(__name__)

TICK_S = 5.0  # how often an engine looks for dead instances
FOREIGN_TICK_S = 1.0  # and how often at what others use on a device that is not for pages alone
CALM_S = 0.02
"""What is not urgent waits so long after pressure has risen: every engine's thread is woken then,
and would keep a core from the one that gives.
"""


class Lookout:
    """One device's pressure on one instance, and what is to be done meanwhile. One thread."""

    def __init__(
        self,
        account: Account,
        ledger: Ledger,
        memory: Memory | None,
        instance: str,
        gives: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``memory`` as ``Device.memory``; ``gives`` says whether the instance has much to give."""
        self._account, self._ledger, self._memory = account, ledger, memory
        self._gives = gives
        self._clock = clock
        self._tick_s = TICK_S if memory is None else FOREIGN_TICK_S
        self._seen = account.pressure_seq
        self._journal = Journal(ledger, instance, clock)
        self._logged: int | None = None  # the ledger's version

    def rounds(self) -> Iterator[bool]:
        """Yields True when pressure has risen: at once, or a moment later where there is little to
        give. False at every tick, after the surroundings were looked at: what others use may have
        grown. Ends once the ledger is closed.
        """
        due_s = self._clock() + self._tick_s
        put_off_s: float | None = None  # since when pressure has not been told
        unsaid = False  # pressure rose, and the log does not say so yet
        while self._ledger.core.usable:
            wait_s = max(0.0, due_s - self._clock())
            calm = put_off_s is None and not unsaid
            now = self._account.wait_pressure(self._seen, wait_s if calm else min(wait_s, CALM_S))
            rose, self._seen = now != self._seen, now
            now_s = self._clock()
            if rose:
                unsaid = self._journal.due
                put_off_s = now_s if put_off_s is None else put_off_s
            if put_off_s is not None and (not rose or self._gives() or now_s - put_off_s >= CALM_S):
                put_off_s = None
                yield True
            if unsaid and not rose:
                unsaid = False
                self._log()
            if now_s < due_s:
                continue
            due_s = now_s + self._tick_s
            if not self._look_around():
                return
            yield False
            self._log()

    def _log(self) -> None:
        """Reading all accounts costs a millisecond: not while none of them has changed."""
        version = self._account.version()
        if self._journal.due and version != self._logged:
            self._logged = version
            self._journal.look()

    def _look_around(self) -> bool:
        """Clears the rows of the dead and measures what others use; False once the ledger is
        closed.
        """
        try:
            self._ledger.reap()
            if self._memory is not None:
                foreign.keep_fresh(self._ledger, self._memory, 0.9 * FOREIGN_TICK_S)
        except (LedgerBusyError, UnavailableError) as error:
            logger.warning("kvcached: %s", error)
        except LedgerError:
            return False
        return True
