"""An idle engine's KV cache back to the others: through the ledgers, without asking the engine."""

from __future__ import annotations

import logging
from pathlib import Path

from kvcached import devices
from kvcached.control import Pool
from kvcached.errors import InvalidArgumentError, LedgerError
from kvcached.ledger import Ledger
from kvcached.processes import session_processes
from kvcached.units import format_size

logger = logging.getLogger(__name__)


def give_back(directory: Path, session: int, name: str) -> int:
    """Takes warm pages and cached blocks from the engine whose processes are of a session, on all
    its devices. Returns bytes. Blocks for some seconds at most: call it from a thread.
    """
    pids = set(session_processes(session))
    given = 0
    try:
        names = devices.shared(directory)
    except LedgerError as error:
        logger.info("%s: nothing comes back: %s", name, error)
        return 0
    for device in names:
        try:
            with Pool(Ledger.open(directory, device, create=False)) as pool:
                for account in pool.snapshot().accounts:
                    if pids.isdisjoint(account.pids) or not account.owner_alive:
                        continue
                    given += pool.reclaim(account.instance).given
        except (LedgerError, InvalidArgumentError) as error:  # it has just ended, or another fault
            logger.info("%s: nothing comes back on %s: %s", name, device, error)
    if given:
        logger.info("%s is idle: %s of KV cache went back", name, format_size(given))
    return given
