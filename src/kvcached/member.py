"""A mapping process's side of an account in the ledger; see ``kvcached.ledger``."""

from __future__ import annotations

from kvcached import vmm_ops
from kvcached.closing import Closing


class Member(Closing):
    """A process that maps memory for an instance: it says what exists and what is gone."""

    def __init__(self, core: vmm_ops.Member, segment: vmm_ops.Segment) -> None:
        self.core = core
        self._segment = segment

    def pin(self, size_bytes: int) -> bool:
        """Charges and books bytes that this process creates right after, without a lease.

        For what is mapped before the scheduler exists. False as ``Account.lease``; until it is
        granted, the refused bytes count as demand. Raises LedgerError if the handle is closed.
        """
        return self.core.pin(size_bytes)

    def describe(self, block_bytes: int, block_tokens: int, page_bytes: int) -> None:
        """As ``Account.describe``: a worker knows its pages before there is an owner, who reads
        them here.
        """
        self.core.describe(block_bytes, block_tokens, page_bytes)

    def set_aside(self, size_bytes: int) -> bool:
        """Keeps leases off so many bytes, which are about to be allocated beside pages: weights,
        activations, another program (``kvcached.holds``). 0 ends it, and so does the member's end.

        What is allocated is foreign memory then, and is measured as such. By so much as foreign
        memory grows from now on, less is kept, so that nothing is counted twice; where it falls
        again, as much is kept as before.

        The bytes are kept from now on in any case, so that they gather. False: others hold some
        of them still; the rest is this member's demand. Ask again until it is True.
        Raises LedgerError if the handle is closed.
        """
        return self.core.set_aside(size_bytes)

    def set_demand(self, size_bytes: int) -> None:
        """Says how many leased bytes the device refuses; 0 when it gave them.

        A growing demand raises the pressure: others give back, so that the device can give.
        """
        self.core.set_demand(size_bytes)

    def created(self, size_bytes: int) -> None:
        """Books bytes that exist now, under a lease of the owner."""
        self.core.created(size_bytes)

    def released(self, size_bytes: int) -> None:
        """Books bytes that are gone, which ends their lease. Call it after they are.

        Raises InvalidArgumentError if this member does not hold so much.
        """
        self.core.released(size_bytes)

    def held(self) -> int:
        """Bytes booked for this member."""
        return self.core.held()

    @property
    def lock_fd(self) -> int:
        """The descriptor whose lock says that this process lives; -1 once closed.

        Descriptors of memory must be numbered above it: a dying process lets go of the highest
        first, so the lock falls only when that memory is gone.
        """
        return self._segment.lock_fd

    def close(self) -> None:
        """Leaves the account. Release the memory first: what is booked counts as gone."""
        self.core.close()
