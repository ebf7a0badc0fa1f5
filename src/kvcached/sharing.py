"""The policy at work for one account: what it may lease, and what it should give back.

Nothing is computed while nobody waits: that check is the core's and takes a fraction of a
microsecond. Under pressure a plan is made once for each version of the ledger.
"""

from __future__ import annotations

from typing import Protocol

from kvcached.errors import LedgerBusyError
from kvcached.policy import Target


class Rival(Protocol):
    """What the policy needs of an account, or of a group of them (``kvcached.group``)."""

    def others_demand(self) -> int: ...
    def pressed(self) -> bool: ...
    def version(self) -> int: ...
    def target(self, page: int, demand: int = 0) -> Target: ...
    def press(self) -> None: ...
    def reap(self) -> int: ...


class FairShare:
    """One account among the others. Any thread may use one, but each thread needs its own.

    The account's numbers must be published before a question is asked.
    """

    def __init__(self, account: Rival, page_bytes: int) -> None:
        self._account = account
        self._page_bytes = page_bytes
        self._seen = -1

    def may_lease(self, size_bytes: int) -> bool:
        """Whether fair shares leave so much for the account, beyond what it keeps.

        Whether memory is free is for the lease to say. Demands of the dead do not count: their
        rows are cleared before the answer is no. A no raises the pressure as a refused lease
        does: an engine may have come to rest meanwhile, which changes no number.
        """
        while self._account.others_demand() > 0:
            plan = self._account.target(self._page_bytes, size_bytes)
            if size_bytes <= plan.grant:
                return True
            if not self._reaped():
                self._account.press()
                return False
        return True

    def _reaped(self) -> bool:
        try:
            return self._account.reap() > 0
        except LedgerBusyError:
            return False

    def pressed(self) -> bool:
        """Whether the account may have to give something back. Cheap."""
        return self._account.pressed()

    def news(self) -> Target | None:
        """What to do now; None where nothing has changed since it was last asked."""
        version = self._account.version()
        if version == self._seen:
            return None
        self._seen = version
        return self._account.target(self._page_bytes)
