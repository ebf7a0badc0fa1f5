"""Room on a GPU for what an engine is about to allocate beside its pages."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from kvcached import foreign
from kvcached.closing import Closing
from kvcached.engines.vllm.identity import Identity
from kvcached.errors import OutOfMemoryError
from kvcached.foreign import Memory
from kvcached.ledger import Ledger
from kvcached.units import format_size

logger = logging.getLogger(__name__)

_ASK_AGAIN_S = 0.05
_SAY_AGAIN_S = 5.0


class GpuRoom(Closing):
    """Memory that is set aside for one worker. One thread uses it.

    Without a ``timeout_s`` it is waited for without end, and as soon as the ledger grants it, that
    is enough. With one, counted from now, the device must have it too.
    """

    def __init__(
        self,
        ledger: Ledger,
        memory: Memory,
        who: Identity,
        purpose: str = "the model to load",
        timeout_s: float | None = None,
    ) -> None:
        self._ledger = ledger
        self._memory = memory
        self._instance = who.instance
        self._purpose = purpose
        self._timeout_s = timeout_s
        self._since = time.monotonic()
        self._member = ledger.attach(who.instance, who.name)
        self._least = 0  # bytes that it sets aside in any case

    def wait_for_room(self, size_bytes: int) -> None:
        """Sets memory aside, and waits until it is there: others give back for it what they only
        cache, and lease nothing meanwhile.

        Raises OutOfMemoryError after the timeout, naming what is wanted, what is free and who
        holds the rest.
        """
        self.measure()
        said = 0.0
        while not self._has(size_bytes):
            now = time.monotonic()
            if now - said > _SAY_AGAIN_S:
                said = now
                snapshot = self._ledger.snapshot()
                logger.warning(
                    "kvcached: waiting on %s for %s of memory for %s; KV caches hold %s, and %s "
                    "are in use beside them",
                    self._ledger.device,
                    format_size(size_bytes),
                    self._purpose,
                    format_size(snapshot.charge),
                    format_size(snapshot.foreign),
                )
            self._pause(f"{format_size(size_bytes)} for {self._purpose}")
            self.measure()

    @contextmanager
    def in_turn(self, devices: Sequence[str]) -> Iterator[None]:
        """Enters the block when the instance has room on all ``devices`` before this one, and
        leaves it when it has room on all of them.

        Every engine takes its devices in this order, so two that start at the same time do not
        wait for each other with half of the room each; and no rank starts before all can, since
        vLLM's ranks wait for each other for a limited time only.
        Raises OutOfMemoryError after the timeout.
        """
        own, directory = self._ledger.device, self._ledger.path.parent
        with ExitStack() as stack:
            ledgers = [
                stack.enter_context(Ledger.open(directory, name, create=False, read_only=True))
                for name in devices
                if name != own
            ]
            self._least = 1 if ledgers else 0  # so that other ranks see that it was granted
            self._wait_for_ranks([ledger for ledger in ledgers if ledger.device < own])
            yield
            self._wait_for_ranks(ledgers)

    def _wait_for_ranks(self, ledgers: Sequence[Ledger]) -> None:
        for ledger in ledgers:
            while not _has_room(ledger, self._instance):
                self._pause(f"room for {self._purpose} on {ledger.device}")

    def _pause(self, what: str) -> None:
        if self._timeout_s is not None and time.monotonic() - self._since > self._timeout_s:
            raise OutOfMemoryError(
                f"kvcached: {self._ledger.device}: {what} did not come free within "
                f"{self._timeout_s:g} s; {format_size(self._free())} are free. In use: "
                f"{self._ledger.snapshot().holders()}"
            )
        time.sleep(_ASK_AGAIN_S)

    def _has(self, size_bytes: int) -> bool:
        granted = self._member.set_aside(self._wanted(size_bytes))
        return granted and (self._timeout_s is None or self._free() >= size_bytes)

    def _free(self) -> int:
        used, total = self._memory()
        return total - used

    def _wanted(self, size_bytes: int) -> int:
        """What of it lies in the ledger's capacity, as far as it can be had at all."""
        inside = foreign.inside(self._ledger, self._memory, size_bytes)
        return max(self._least, min(inside, self._most()))

    def _most(self) -> int:
        """What could be had if everybody else kept only what is theirs: more is never there, and
        whether less is enough is for the engine to find out.
        """
        now = self._ledger.snapshot()
        floors = sum(max(account.guarantee, account.pinned) for account in now.accounts)
        return max(0, now.capacity - now.headroom - now.foreign - floors)

    def measure(self) -> None:
        """Tells the ledger what is in use beside pages."""
        foreign.refresh(self._ledger, self._memory)

    def close(self) -> None:
        """What was taken is measured, and nothing is set aside any more."""
        self.measure()
        self._member.close()


def _has_room(ledger: Ledger, instance: str) -> bool:
    """Whether a member of the instance has been granted what it set aside there."""
    account = ledger.snapshot().account(instance)
    members = () if account is None else account.members
    return any(member.set_aside > 0 and member.demand == 0 for member in members)
