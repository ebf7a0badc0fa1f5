"""What an engine's pressure thread does beside waking it: others' rows, others' memory."""

from __future__ import annotations

import logging

from kvcached import foreign
from kvcached.errors import LedgerBusyError, LedgerError, UnavailableError
from kvcached.foreign import Memory
from kvcached.ledger import Ledger

logger = logging.getLogger(__name__)

TICK_S = 5.0  # how often an engine looks for dead instances
FOREIGN_TICK_S = 1.0  # and how often at what others use on a device that is not for pages alone


def tick_s(memory: Memory | None) -> float:
    """How often to look around on a device; ``memory`` as ``Device.memory``."""
    return TICK_S if memory is None else FOREIGN_TICK_S


def look_around(ledger: Ledger, memory: Memory | None) -> bool:
    """Clears the rows of the dead and measures what others use; False once the ledger is closed."""
    try:
        ledger.reap()
        if memory is not None:
            foreign.keep_fresh(ledger, memory, 0.9 * FOREIGN_TICK_S)
    except (LedgerBusyError, UnavailableError) as error:
        logger.warning("kvcached: %s", error)
    except LedgerError:
        return False
    return True
