"""An instance for tests of the page pool: its pool, and the member that would map for it."""

from __future__ import annotations

from kvcached.commands import Commands
from kvcached.ledger import Account, Ledger, Member
from kvcached.pages import PagePool
from kvcached.vmm_ops import Blocks

PAGE = 64 << 10
PER_PAGE = 4


class Instance:
    """A page pool and the member that would map for it; nothing is mapped, all is booked."""

    def __init__(self, ledger: Ledger, name: str, pages: int = 16, **options: int) -> None:
        self.member: Member = ledger.attach(name, name, PAGE)
        assert self.member.pin(PAGE)
        self.account: Account = ledger.join(name, name, PAGE)
        self.evicted: list[int] = []
        self.now_s = 0.0
        self.pool = PagePool(
            Blocks(pages * PER_PAGE, PER_PAGE),
            self.account,
            PAGE,
            warm_low=options.get("warm_low", 1),
            warm_high=options.get("warm_high", 2),
            max_cached_blocks=options.get("max_cached_blocks"),
            preempt=bool(options.get("preempt")),
            clock=lambda: self.now_s,
            on_evict=self.evicted.extend,
        )
        self.blocks = self.pool.blocks
        self.mapped = {0}
        self.needed = {0}
        self.unused: set[int] = set()  # mapped ahead, and not needed since

    def apply(self, commands: Commands | None) -> Commands:
        """What the mapping process does, in its order."""
        if commands is None:
            return Commands((), ())
        assert set(commands.unmap) <= self.mapped
        self.mapped -= set(commands.unmap)
        if commands.unmap:
            self.member.released(len(commands.unmap) * PAGE)
        assert not set(commands.ahead) & self.mapped
        again = set(commands.map) & self.mapped
        assert again <= self.unused, "only a page that was mapped ahead is named again"
        self.unused = self.unused - again - set(commands.unmap) | set(commands.ahead)
        fresh = {*commands.map, *commands.ahead} - self.mapped
        self.mapped |= fresh
        self.member.created(len(fresh) * PAGE)
        return commands

    def take(self) -> Commands | None:
        """Commands leave: every page that holds used blocks was named as needed by now."""
        commands = self.pool.take_commands()
        if commands is not None:
            self.needed = (self.needed - set(commands.unmap)) | set(commands.map)
        used = {page for page in range(self.blocks.num_pages) if self.blocks.used_in(page)}
        assert used <= self.needed
        return commands

    def carry(self) -> Commands:
        return self.apply(self.take())

    def alloc(self, count: int) -> list[int]:
        assert self.pool.ensure(count)
        ids = self.blocks.alloc(count)
        assert ids is not None
        return ids

    @property
    def charged_pages(self) -> int:
        charge = self.account.charge()
        assert charge % PAGE == 0
        return charge // PAGE

    def check(self, under_way: int = 0) -> None:
        """Charged is what is present or still waits to be unmapped."""
        self.pool.check()
        waiting = len(self.pool._to_unmap)
        assert self.charged_pages == self.blocks.present_pages + waiting + under_way
