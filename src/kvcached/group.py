"""One instance on several devices: its accounts as if they were one.

The ranks of a tensor-parallel engine hold the same pages, each on its own device, and share block
ids. So a page is leased on all devices or on none, and given back on all; of everything that
devices say, the one with the least decides. ``AccountGroup`` does what a page pool asks of an
account and hides how many devices there are; an instance on one device has no group, only its
account.

Nothing is held while something is waited for: a lease that one device refuses is given back on
the others at once, so two instances cannot hold a device each and wait for the other's. What
keeps them from taking turns for ever is the demand, which stands on all devices until it is
served everywhere: each device's fair shares keep what lies within the instance's own.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvcached.ledger import Account
from kvcached.policy import Target, fair_shares, target


class AccountGroup:
    """The accounts of one instance, one a device, on each of which a page costs the same.

    All sizes are bytes on each device. Not thread-safe: it belongs to the scheduler; another
    thread uses the accounts themselves.
    """

    def __init__(self, accounts: Sequence[Account], page_bytes: int) -> None:
        # Everybody asks in the same order: of those who ask for the last memory at the same
        # moment, one gets it everywhere.
        self.accounts = tuple(sorted(accounts, key=lambda account: account.device))
        self._page_bytes = page_bytes
        self._short = self.accounts[0]  # the one that refused last

    # --- leases

    def lease(self, size_bytes: int) -> bool:
        """Asks for so many bytes on every device; see ``Account.lease``. All or nothing."""
        granted: list[Account] = []
        # Those that will refuse are asked first (and clear the rows of the dead), so that as a
        # rule nothing has to be undone, which would wake everybody.
        for account in sorted(self.accounts, key=lambda each: each.leasable() >= size_bytes):
            if not account.lease(size_bytes):
                self._short = account
                for other in granted:
                    other.give_back(size_bytes)
                return False
            granted.append(account)
        return True

    def give_back(self, size_bytes: int) -> None:
        """Ends a lease of bytes that were never created, on every device."""
        for account in self.accounts:
            account.give_back(size_bytes)

    def leasable(self) -> int:
        """Bytes that a lease would grant now."""
        return min(account.leasable() for account in self.accounts)

    def ceiling(self) -> int:
        """The most bytes that the instance can ever hold on each device."""
        return min(account.ceiling() for account in self.accounts)

    def charge(self) -> int:
        """Bytes that count now, on the device where they are most."""
        return max(account.charge() for account in self.accounts)

    # --- demand and pressure

    def set_demand(self, size_bytes: int) -> None:
        """Says how many bytes are wanted that could not be leased; 0 when served.

        On each device that is at most what the others would give by fair shares: what one cannot
        give, others need not gather. It stands also where memory is free, and keeps that free.
        """
        reach = [self._reach(account, size_bytes) if size_bytes else 0 for account in self.accounts]
        for index, account in enumerate(self.accounts):
            account.set_demand(min(size_bytes, *reach[:index], *reach[index + 1 :]))

    def _reach(self, account: Account, demand: int) -> int:
        """Bytes that fair shares would add on one device if it demanded so much."""
        lendable, standings, own = account.standings(self._page_bytes, demand)
        mine = standings[own]
        return max(0, mine.edge(fair_shares(lendable, standings)[own]) - mine.held)

    def others_demand(self) -> int:
        """Bytes that all other accounts want and could not lease, where that is most."""
        return max(account.others_demand() for account in self.accounts)

    def pressed(self) -> bool:
        """Whether the instance may have to give something back on any device."""
        return any(account.pressed() for account in self.accounts)

    def press(self) -> None:
        """Raises the pressure on every device."""
        for account in self.accounts:
            account.press()

    def target(self, page: int, demand: int = 0) -> Target:
        """What to do now: the least that a device leaves, the most that one asks back."""
        plans = [target(*account.standings(page, demand)) for account in self.accounts]
        grant = min(plan.grant for plan in plans)
        if grant < demand:
            self._short = next(
                account
                for account, plan in zip(self.accounts, plans, strict=True)
                if plan.grant == grant
            )
        return Target(
            share=min(plan.share for plan in plans),
            give=max(plan.give for plan in plans),
            owed=max(plan.owed for plan in plans),
            grant=grant,
            coming=min(plan.coming for plan in plans if plan.grant == grant),
        )

    def version(self) -> int:
        """Changes with everything that ``target`` says."""
        return sum(account.version() for account in self.accounts)

    def reap(self) -> int:
        """Clears the rows of dead processes; returns how many. Raises LedgerBusyError."""
        return sum(account.reap() for account in self.accounts)

    # --- what is said on every device

    def publish(self, in_use: int, cached: int, warm: int, working: bool = False) -> None:
        """Says what the charged bytes are used for; see ``Account.publish``."""
        for account in self.accounts:
            account.publish(in_use, cached, warm, working)

    def set_ready(self, ready: bool = True) -> None:
        """Tells tools that the engine serves now."""
        for account in self.accounts:
            account.set_ready(ready)

    def set_asleep(self, asleep: bool) -> None:
        """Tells tools that the engine sleeps, or serves again."""
        for account in self.accounts:
            account.set_asleep(asleep)

    def describe(self, block_bytes: int, block_tokens: int, page_bytes: int) -> None:
        """Says what the instance's blocks and pages are, on each device."""
        for account in self.accounts:
            account.describe(block_bytes, block_tokens, page_bytes)

    def count_reclaimed(self, size_bytes: int) -> None:
        """Counts bytes that were given back under pressure, on each device."""
        for account in self.accounts:
            account.count_reclaimed(size_bytes)

    def publish_cache(self, hits: int, misses: int, evictions: int, by_pressure: int) -> None:
        """Says what the prefix cache did; see ``Account.publish_cache``."""
        for account in self.accounts:
            account.publish_cache(hits, misses, evictions, by_pressure)

    def asked(self) -> int:
        """The most bytes that operators asked it to give back on one of its devices."""
        return max(account.asked() for account in self.accounts)

    def answer(self, size_bytes: int) -> None:
        """Says that so much is dealt with, on every device that was asked for it."""
        for account in self.accounts:
            account.answer(min(size_bytes, account.asked()))

    # --- waiting

    @property
    def freed_seq(self) -> int:
        """Changes whenever memory or leases come back on any device."""
        return sum(account.freed_seq for account in self.accounts)

    def wait_freed(self, seen_seq: int, timeout_s: float) -> int:
        """Sleeps until memory comes back where it is short; returns ``freed_seq``.

        That is the device that refused last: while it has none, what comes back on others helps
        nobody. Returns at once if ``freed_seq`` is not ``seen_seq``. May return early.
        """
        short = self._short
        seen = short.freed_seq
        if self.freed_seq == seen_seq:
            short.wait_freed(seen, timeout_s)
        return self.freed_seq

    def close(self) -> None:
        """Gives up all accounts."""
        for account in self.accounts:
            account.close()


def grouped(accounts: Sequence[Account], page_bytes: int) -> Account | AccountGroup:
    """What a page pool leases from: the only account itself, or a group."""
    return accounts[0] if len(accounts) == 1 else AccountGroup(accounts, page_bytes)
