"""A fork bomb of demands: 64 instances want everything, join and die at random.

Each operation is on the real ledger and a real page pool, and after each of them it is added up:
nothing is lent twice, no limit is passed, no guarantee is taken or refused.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from kvcached.commands import Commands
from kvcached.errors import InvalidArgumentError, LedgerError
from kvcached.ledger import Ledger
from kvcached.pages import PagePool
from kvcached.vmm_ops import Blocks

DEVICE = "host:bomb"
PAGE = 4096
PER_PAGE = 4
INSTANCES = 64
LENDABLE = 3 * INSTANCES * PAGE
HEADROOM = 10 * PAGE


class Instance:
    """One that wants everything. Its commands take a while until they are carried out."""

    def __init__(self, directory: Path, name: str, dice: random.Random) -> None:
        self.name = name
        self.ledger = Ledger.open(directory, DEVICE)
        try:
            self.member = self.ledger.attach(name, name, PAGE)
        except LedgerError:
            self.ledger.close()
            raise
        assert self.member.pin(PAGE), "its page is guaranteed, and all others keep to it"
        self.account = self.ledger.join(name, name, PAGE)
        self.account.describe(PAGE // PER_PAGE, 16, PAGE)
        pages = (LENDABLE // PAGE) * 2
        self.pool = PagePool(
            Blocks(pages * PER_PAGE, PER_PAGE),
            self.account,
            PAGE,
            warm_low=dice.randint(0, 1),
            warm_high=dice.randint(1, 3),
            preempt=dice.random() < 0.2,
            on_evict=lambda _: None,
        )
        self.pool.publish()
        self.guarantee, self.limit = 0, None if dice.random() < 0.8 else dice.randint(1, 30) * PAGE
        self.ledger.set_limit(name, self.limit)
        self.ledger.set_weight(name, dice.choice([0.5, 1.0, 1.0, 4.0]))
        self.held: list[list[int]] = []
        self.under_way: list[Commands] = []
        self.mapped = {0}

    @property
    def present(self) -> int:
        return self.pool.blocks.present_pages * PAGE

    def carry(self) -> None:
        commands = self.under_way.pop(0)
        if commands.unmap:
            self.member.released(len(commands.unmap) * PAGE)
        fresh = fresh_pages(commands, self.mapped)
        self.member.created(len(fresh) * PAGE)
        self.mapped = self.mapped - {*commands.unmap} | fresh

    def bytes_to_come(self) -> int:
        """What the commands under way will create."""
        mapped, size = self.mapped, 0
        for commands in self.under_way:
            fresh = fresh_pages(commands, mapped)
            mapped = mapped - {*commands.unmap} | fresh
            size += len(fresh) * PAGE
        return size


def fresh_pages(commands: Commands, mapped: set[int]) -> set[int]:
    """The pages that commands create; one that was mapped ahead is named again when needed."""
    return {*commands.map, *commands.ahead} - (mapped - {*commands.unmap})


class Bomb:
    def __init__(self, directory: Path, seed: int) -> None:
        self.directory = directory
        self.dice = random.Random(seed)
        self.ledger = Ledger.open(directory, DEVICE, LENDABLE + HEADROOM, HEADROOM)
        self.living: list[Instance] = []
        self.charges: dict[str, int] = {}
        self.done: Counter[str] = Counter()
        self.operations: list[tuple[int, Callable[[Instance], None]]] = [
            (40, self.want),
            (25, self.end_a_request),
            (20, self.relieve),
            (15, self.settle),
            (30, self.carry),
            (2, self.guarantee),
            (1, self.die),
        ]

    def run(self, operations: int) -> None:
        weights = [weight for weight, _ in self.operations]
        kinds = [kind for _, kind in self.operations]
        for number in range(operations):
            if len(self.living) < INSTANCES and (
                not self.living or self.dice.random() < 0.02 * (INSTANCES - len(self.living))
            ):
                self.join(number)
            it = self.dice.choice(self.living)
            before = self.charges[it.name]
            (operation,) = self.dice.choices(kinds, weights)
            operation(it)
            if it in self.living:
                self.add_up(it, before)
            if number % 1000 == 0:
                self.check_everything()
        self.check_everything()

    def join(self, number: int) -> None:
        # A page for a newcomer is owed at once, but gone only when its holder has unmapped it.
        free = LENDABLE - sum(self.charges.values())
        if free < PAGE:
            return
        try:
            it = Instance(self.directory, f"i{number}", self.dice)
        except LedgerError:  # all of it is guaranteed to others
            self.done["turned away"] += 1
            return
        self.living.append(it)
        self.charges[it.name] = it.account.charge()
        self.done["joined"] += 1

    def want(self, it: Instance) -> None:
        """As much as it can think of, or what one request needs."""
        count = self.dice.choice([1, 3, 8, LENDABLE // PAGE * PER_PAGE // 2])
        if it.pool.closed:
            self.done["closed"] += 1
            return
        it.pool.prefer_growth(count)
        fresh = -(-(count - it.pool.blocks.available()) // PER_PAGE) * PAGE
        free = LENDABLE - sum(self.charges.values())
        if it.pool.ensure(count):
            it.account.set_demand(0)
            ids = it.pool.blocks.alloc(count)
            assert ids is not None
            it.held.append(ids)
            self.done["served"] += 1
        else:
            it.pool.want(1 << 20)
            self.done["refused"] += 1
            sure = it.account.charge() + fresh <= it.guarantee
            assert not (sure and fresh <= free), "within its guarantee, and it is there"

    def end_a_request(self, it: Instance) -> None:
        if it.held:
            ids = it.held.pop(self.dice.randrange(len(it.held)))
            it.pool.blocks.free(ids, cached=self.dice.random() < 0.7)

    def relieve(self, it: Instance) -> None:
        before = it.present
        given = it.pool.relieve()
        assert it.present == before - given >= min(before, it.guarantee)
        self.done["given"] += given // PAGE

    def settle(self, it: Instance) -> None:
        it.pool.settle(idle=not it.held)
        it.pool.publish()
        if (commands := it.pool.take_commands()) is not None:
            it.under_way.append(commands)

    def carry(self, it: Instance) -> None:
        if it.under_way:
            it.carry()

    def guarantee(self, it: Instance) -> None:
        wanted = self.dice.randint(0, 12) * PAGE
        if it.limit is not None:
            wanted = min(wanted, it.limit)
        try:
            self.ledger.set_guarantee(it.name, wanted)
        except InvalidArgumentError:
            self.done["guarantee refused"] += 1
        else:
            it.guarantee = wanted

    def die(self, it: Instance) -> None:
        """With everything that it holds and all that is under way."""
        self.living.remove(it)
        it.ledger.close()
        del self.charges[it.name]
        self.done["died"] += 1

    def add_up(self, it: Instance, before: int) -> None:
        """Only who acts is charged differently, so a sum is kept instead of read anew."""
        charge = it.account.charge()
        self.charges[it.name] = charge
        assert sum(self.charges.values()) <= LENDABLE
        assert charge >= it.present
        assert it.limit is None or charge <= max(before, it.limit, PAGE)

    def check_everything(self) -> None:
        seen = self.ledger.snapshot()
        assert {a.instance: a.charge for a in seen.accounts} == self.charges
        assert seen.charge <= seen.high_water <= LENDABLE
        for it in self.living:
            it.pool.check()
            assert it.member.held() + it.bytes_to_come() <= it.account.charge()

    def end(self) -> None:
        """When all are gone, all of it can be leased."""
        while self.living:
            self.die(self.living[0])
        with self.ledger.join("last", "last") as last:
            assert last.lease(LENDABLE)
        self.ledger.close()
        print(dict(self.done))


@pytest.mark.parametrize(
    ("operations", "seed"),
    [(5_000, 1), pytest.param(1_000_000, 2, marks=pytest.mark.slow)],
)
def test_everyone_wants_all(tmp_path: Path, operations: int, seed: int) -> None:
    bomb = Bomb(tmp_path / "ledger", seed)
    bomb.run(operations)
    assert len(bomb.living) > INSTANCES // 2
    bomb.end()
    for event in ("joined", "died", "served", "refused", "given", "closed"):
        assert bomb.done[event] > operations // 1000, event
