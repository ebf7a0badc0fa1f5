"""The ranks of one engine: each ends when another one has died, also while the engine starts.

Later the engine's core follows its workers, and they follow it. Until it is built it waits for
them, and vLLM's ranks for each other: seconds, with all their memory.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from kvcached import watch
from kvcached.engines.vllm.identity import Identity
from kvcached.ledger import Ledger


def follow(directory: Path, devices: Sequence[str], who: Identity) -> None:
    """Ends this worker with the first rank that dies, once the ledgers of the engine's ``devices``
    know all of them. Returns at once.
    """
    ledgers = [Ledger.open(directory, name, create=False, read_only=True) for name in devices]

    def find() -> set[int] | None:
        accounts = [ledger.snapshot().account(who.instance) for ledger in ledgers]
        members = [member for each in accounts if each is not None for member in each.members]
        pids = {member.pid for member in members}
        if len(pids) < who.ranks:
            return None
        for ledger in ledgers:
            ledger.close()
        return pids - {os.getpid()}

    watch.end_with_found(find)
