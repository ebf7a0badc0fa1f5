"""The ledger: the shared record of one device that decides who may hold how much of its memory.

No process is in charge of it. Every instance has an account in one small shared file; whoever wants
memory leases it there first, and the rows of the dead are cleared by the living.

    ledger = Ledger.open(directory, "host:demo", capacity_bytes=4 * GIB)
    member = ledger.attach(instance, "chat")    # in each process that maps memory
    account = ledger.join(instance, "chat")     # in the process that schedules
    if account.lease(size):                     # False: none now; raise the demand and wait
        ...                                     # the member creates the memory
        member.created(size)
        ...
        member.released(size)                   # the lease ends where the memory does

All methods may be called from any thread; those that can block let go of the GIL. All sizes are
bytes. A handle belongs to the process that opened it: in a forked child it does nothing, and its
questions are answered with 0 or a LedgerError. Open the ledger before any memory is created (see
Member.lock_fd).
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from kvcached import vmm_ops
from kvcached.closing import Closing
from kvcached.errors import LedgerError
from kvcached.member import Member
from kvcached.policy import Standing, Target, fixed_weight, target
from kvcached.snapshot import LedgerSnapshot, ledger_snapshot

__all__ = ["Account", "Ledger", "Member"]


class Ledger(Closing):
    """One process's handle to a device's ledger."""

    def __init__(self, core: vmm_ops.Segment) -> None:
        self.core = core

    @classmethod
    def open(
        cls,
        directory: Path,
        device: str,
        capacity_bytes: int | None = None,
        headroom_bytes: int = 0,
        create: bool = True,
        read_only: bool = False,
    ) -> Ledger:
        """Opens the ledger of ``device`` in ``directory``, creating both if need be.

        ``capacity_bytes`` is needed to create a ledger; None takes what the file says.
        ``headroom_bytes`` counts only when the ledger is created. ``read_only`` needs no write
        permission, creates nothing, and allows only ``snapshot`` and the waits.

        Raises LedgerError if the file is cut, foreign, of another version, device, capacity or
        user, a symbolic link, or missing; InvalidArgumentError if the arguments make no sense.
        """
        directory = Path(directory)
        if create and not read_only:
            try:
                directory.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise LedgerError(f"{directory}: cannot create its parent: {error}") from error
        capacity = -1 if capacity_bytes is None else max(capacity_bytes, 0)
        return cls(
            vmm_ops.Segment.open(
                str(directory), device, capacity, headroom_bytes, create, read_only
            )
        )

    @property
    def path(self) -> Path:
        """The ledger's file."""
        return Path(self.core.path)

    @property
    def device(self) -> str:
        """The device's name, as it was opened."""
        return self.core.device

    @property
    def capacity(self) -> int:
        """Bytes of the device that the ledger governs, headroom included."""
        return self.core.capacity

    @property
    def headroom(self) -> int:
        """Bytes that leases leave alone."""
        return self.core.headroom

    @property
    def lock_fd(self) -> int:
        """See Member.lock_fd; -1 once closed and in a forked child."""
        return self.core.lock_fd

    def join(self, instance: str, name: str, pinned_bytes: int = 0) -> Account:
        """Becomes the owner of the instance's account, which is found by ``instance`` or created.

        ``name`` is for people and is cut after 63 bytes; who creates the account names it.
        ``pinned_bytes`` is an implicit guarantee: what the instance cannot run without. What
        members have created already counts as leased from now on.

        Raises LedgerError if the account has a living owner, if there is no row left, or if the
        pinned bytes do not fit beside what others are guaranteed; LedgerBusyError.
        """
        return Account(self.core.join(instance, name, pinned_bytes), self.core)

    def attach(self, instance: str, name: str, pinned_bytes: int = 0) -> Member:
        """Becomes a member of the instance's account, which is found or created as in ``join``.

        A process that maps its pinned page before the scheduler exists names it here, so that
        others make room for it. Raises as ``join``.
        """
        return Member(self.core.attach(instance, name, pinned_bytes), self.core)

    def snapshot(self) -> LedgerSnapshot:
        """Everything the ledger says. Takes no lock. Raises LedgerError on a file that was cut."""
        return ledger_snapshot(self.core.snapshot())

    def reap(self) -> int:
        """Clears the rows of dead processes; returns how many. Call it on a slow tick.

        A refused lease does so by itself. Raises LedgerBusyError.
        """
        return self.core.reap()

    def set_guarantee(self, key: str, guarantee_bytes: int) -> None:
        """Sets what an account (by instance, or by its name) is sure of.

        Raises InvalidArgumentError, naming both numbers, if all guarantees together would exceed
        what can be lent, or this one the account's limit; LedgerBusyError.
        """
        self.core.set_guarantee(key, guarantee_bytes)

    def set_limit(self, key: str, limit_bytes: int | None) -> None:
        """Sets the most that an account may hold; None for no limit. It may hold more already.

        Raises InvalidArgumentError if that is below its guarantee; LedgerBusyError.
        """
        self.core.set_limit(key, limit_bytes)

    def set_weight(self, key: str, weight: float) -> None:
        """Sets an account's weight in the fair share, 1 to begin with. Raises as ``set_limit``."""
        self.core.set_weight(key, weight)

    def ask_back(self, key: str, size_bytes: int) -> None:
        """Asks an account for so much of what it does not use: warm pages, then cached blocks, also
        below its guarantee. Its scheduler gives what it has and says so (``Account.answer``).

        Raises InvalidArgumentError if there is no such account or nobody schedules for it;
        LedgerBusyError.
        """
        self.core.ask_back(key, size_bytes)

    def set_capacity(
        self, capacity_bytes: int | None = None, headroom_bytes: int | None = None
    ) -> None:
        """Changes the ledger's capacity, its headroom or both. More may be charged already.

        Raises InvalidArgumentError if the guarantees would not fit; LedgerBusyError.
        """
        self.core.set_capacity(capacity_bytes, headroom_bytes)

    def set_foreign(self, foreign_bytes: int) -> None:
        """Says how many bytes of the device are in use and are nobody's pages, as just measured:
        weights, activations, other programs. Leases leave them alone. Takes no lock.
        """
        self.core.set_foreign(foreign_bytes)

    def foreign_age_s(self) -> float:
        """Seconds since anybody said that; infinite where nobody has."""
        age_ms = self.core.foreign_age_ms()
        return math.inf if age_ms < 0 else age_ms / 1000

    def created(self) -> int:
        """Bytes of all pages that exist, over all accounts. Takes no lock; 0 once closed."""
        return self.core.created()

    def close(self) -> None:
        """Gives up every account and membership of this handle. The file stays."""
        self.core.close()


class Account(Closing):
    """The owner's side of an account: one process of the instance schedules for all of it.

    The methods that the hot path needs are the core's own, bound once.
    """

    def __init__(self, core: vmm_ops.Account, segment: vmm_ops.Segment) -> None:
        self.core = core
        self._segment = segment

    @property
    def device(self) -> str:
        """The device's name."""
        return self._segment.device

    def lease(self, size_bytes: int) -> bool:
        """Asks for the right to create so many bytes more. All or nothing.

        False: there is not enough now (rows of the dead were cleared before saying so), or the
        lock could not be had in time. With a demand set, a refusal raises the pressure.
        Raises LedgerError if the handle is closed.
        """
        return self.core.lease(size_bytes)

    def give_back(self, size_bytes: int) -> None:
        """Ends a lease of bytes that were never created.

        Raises InvalidArgumentError if so much is not leased beyond what exists.
        """
        self.core.give_back(size_bytes)

    def leasable(self) -> int:
        """Bytes that a lease would grant now. Cheap while nothing changes."""
        return self.core.leasable()

    def ceiling(self) -> int:
        """The most bytes that the account can ever hold under today's settings."""
        return self.core.ceiling()

    def charge(self) -> int:
        """Bytes that count for this account now."""
        return self.core.charge()

    def set_demand(self, size_bytes: int) -> None:
        """Says how many bytes are wanted that could not be leased; 0 when served.

        A growing demand raises the pressure.
        """
        self.core.set_demand(size_bytes)

    def others_demand(self) -> int:
        """Bytes that all other accounts want and could not lease."""
        return self.core.others_demand()

    def pressed(self) -> bool:
        """Whether this account may have to give something back: others wait for memory, it is
        above its limit, or what all hold and are guaranteed does not fit. Cheap.
        """
        return self.core.pressed()

    def press(self) -> None:
        """Raises the pressure: wakes those who may have to give something back."""
        self.core.press()

    def version(self) -> int:
        """Changes with everything that ``standings`` and ``target`` say."""
        return self.core.version

    def standings(self, page: int, demand: int = 0) -> tuple[int, list[Standing], int]:
        """What the policy needs: the bytes that can be lent, all accounts, this one's place.

        ``page`` is the size of this account's pages, ``demand`` what it wants at least. Takes no
        lock: what changes meanwhile changes the version too.
        """
        lendable, own, rows = self.core.standings()
        standings = [
            Standing(guarantee, limit, fixed_weight(weight), *sizes)
            for guarantee, limit, weight, *sizes in rows
        ]
        if not standings:  # the handle is closed
            return lendable, [Standing(page=page)], 0
        mine = standings[own]
        standings[own] = replace(mine, page=page, demand=max(demand, mine.demand))
        return lendable, standings, own

    def target(self, page: int, demand: int = 0) -> Target:
        """What the policy says to this account; arguments as in ``standings``."""
        return target(*self.standings(page, demand))

    def reap(self) -> int:
        """Clears the rows of dead processes; returns how many. Raises LedgerBusyError."""
        return self._segment.reap()

    def publish(self, in_use: int, cached: int, warm: int, working: bool = False) -> None:
        """Says what the charged bytes are used for, in whole pages, and whether requests run."""
        self.core.publish(in_use, cached, warm, working)

    def set_ready(self, ready: bool = True) -> None:
        """Tells tools that the engine serves now."""
        self.core.set_state(int(ready))

    def set_asleep(self, asleep: bool) -> None:
        """Tells tools that the engine, which served, sleeps: its weights are not on the device; or
        that it serves again.
        """
        self.core.set_state(2 if asleep else 1)

    def describe(self, block_bytes: int, block_tokens: int, page_bytes: int) -> None:
        """Says what the account's blocks and pages are, so that others can tell what fits."""
        self.core.describe(block_bytes, block_tokens, page_bytes)

    def count_reclaimed(self, size_bytes: int) -> None:
        """Counts bytes that were given back under pressure."""
        self.core.count_reclaimed(size_bytes)

    def publish_cache(self, hits: int, misses: int, evictions: int, by_pressure: int) -> None:
        """Says, in blocks so far, what the prefix cache answered, what had to be computed, and
        what it lost: for the account's own use, and because others wanted the memory.
        """
        self.core.publish_cache(hits, misses, evictions, by_pressure)

    def asked(self) -> int:
        """Bytes that operators asked the account to give back, and that are not answered yet."""
        return self.core.asked()

    def answer(self, size_bytes: int) -> None:
        """Says that so much of what was asked for is dealt with: given, or not there."""
        self.core.answer(size_bytes)

    @property
    def pressure_seq(self) -> int:
        """Changes whenever a demand could not be met, and with the settings."""
        return self._segment.pressure_seq

    @property
    def freed_seq(self) -> int:
        """Changes whenever memory or leases come back, and with the settings."""
        return self._segment.freed_seq

    def wait_pressure(self, seen_seq: int, timeout_s: float) -> int:
        """Sleeps until ``pressure_seq`` is not ``seen_seq``; returns it. May return early.

        Read the sequence, then look, then wait: nothing is missed in between.
        """
        return self._segment.wait_pressure(seen_seq, timeout_s)

    def wait_freed(self, seen_seq: int, timeout_s: float) -> int:
        """Sleeps until ``freed_seq`` is not ``seen_seq``; returns it. May return early."""
        return self._segment.wait_freed(seen_seq, timeout_s)

    def close(self) -> None:
        """Gives up the account: from then on only what its members hold is charged."""
        self.core.close()
