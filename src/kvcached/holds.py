"""Room for what is no engine of ours: a training job, a diffusion model, another engine's weights.

    with kvcached.hold("20GiB"):
        train()

Cached memory of the engines goes back until so much is really free on the device, and is kept from
their leases while the hold lives. What the program then takes on a GPU is foreign memory, and is
measured as such: by so much the hold keeps less, so nothing is counted twice, and what the program
frees in between is kept for it again. Foreign memory is not told apart: what another program takes
meanwhile comes out of the hold as well. On the host nothing is measured: the hold keeps all of its
size until it ends.

A hold is a member row of the ledger without pages. It ends with the process that made it, however
that ends: the kernel drops its lock.
"""

from __future__ import annotations

import os
import time
import uuid
from contextlib import ExitStack

from kvcached import devices, foreign
from kvcached.closing import Closing
from kvcached.config import Config
from kvcached.errors import InvalidArgumentError, OutOfMemoryError
from kvcached.units import format_size, parse_size

NAME = "hold"
_LOOK_AGAIN_S = 0.05


class Hold(Closing):
    """Memory of a device that is kept from leases. Any thread may use it, one at a time."""

    def __init__(self, size: int | str, device: str | None = None, name: str = NAME) -> None:
        """``size`` in bytes, or as people write it (``20GiB``). Nothing is kept before ``wait``.

        ``device`` is found as ``devices.find`` says where it is None. ``name`` is for lists.

        Raises ConfigError for a size or device that is not allowed, InvalidArgumentError where
        the device never has so much to give, UnavailableError, LedgerError.
        """
        config = Config.from_env()
        self.size_bytes = parse_size(size) if isinstance(size, str) else size
        self.device = devices.find(config, device)
        self._memory = devices.memory_of(self.device)
        with ExitStack() as undo:
            self._ledger = undo.enter_context(devices.open_ledger(config, self.device))
            self._check_size()
            self._instance = f"{NAME}-{uuid.uuid4()}"
            self._member = self._ledger.attach(self._instance, f"{name}-{os.getpid()}")
            undo.pop_all()

    def _check_size(self) -> None:
        now = self._ledger.snapshot()
        sure = sum(max(account.guarantee, account.pinned) for account in now.accounts)
        beside = 0  # of the device, and not governed by the ledger
        if self._memory is not None:
            beside = max(0, self._memory()[1] - now.capacity)
        most = now.capacity - now.headroom - sure + beside
        if not 0 < self.size_bytes <= most:
            raise InvalidArgumentError(
                f"cannot hold {format_size(self.size_bytes)} of {self.device}: expected more than "
                f"0, and at most {format_size(most)} (the capacity less headroom and guarantees)"
            )

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until so much is free and kept; False, with nothing kept, if it takes too long.

        What is in use is not taken from anybody: that comes as requests end. None waits for ever.
        Raises LedgerError where the ledger has been closed or cut.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            seen = self._ledger.core.freed_seq
            if self._take():
                return True
            left = _LOOK_AGAIN_S
            if deadline is not None:
                left = min(left, deadline - time.monotonic())
            if left <= 0:
                self._member.set_aside(0)
                return False
            self._ledger.core.wait_freed(seen, left)

    def _take(self) -> bool:
        """Whether the ledger keeps so much and the device has it."""
        wanted = self.size_bytes
        if self._memory is not None:
            foreign.refresh(self._ledger, self._memory)
            wanted = foreign.inside(self._ledger, self._memory, wanted)
        if not self._member.set_aside(wanted):
            return False
        if self._memory is None:
            return True
        used, total = self._memory()
        return total - used >= self.size_bytes

    def left(self) -> int:
        """Bytes that are kept now: what has not been taken yet."""
        account = self._ledger.snapshot().account(self._instance)
        return 0 if account is None else account.kept

    def holders(self) -> str:
        """Who has the memory now, in words."""
        return self._ledger.snapshot().holders()

    def close(self) -> None:
        """Ends the hold: engines may have the memory again."""
        self._member.close()
        self._ledger.close()


def hold(size: int | str, *, device: str | None = None, timeout_s: float | None = None) -> Hold:
    """Makes room; see ``kvcached.hold``."""
    with ExitStack() as undo:
        made = undo.enter_context(Hold(size, device))
        if made.wait(timeout_s):
            undo.pop_all()
            return made
        raise OutOfMemoryError(
            f"{format_size(made.size_bytes)} of {made.device} did not come free within "
            f"{timeout_s:g} s: {made.holders()}"
        )
