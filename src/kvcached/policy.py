"""Who may hold how much of a device: fair shares, reclaim targets and leases. Pure functions.

A share is weighted max-min fair between an account's guarantee and its limit. Max-min fairness is
from Bertsekas and Gallager, Data Networks (2nd edition, 6.5.2); its picture is water filling: all
shares rise together, each as fast as its weight, until they have what they want or their limit,
or the memory is used up. What one account does not want, the others get.

Everything is in whole bytes, exact at any size, and deterministic: each instance computes the
same plan from the ledger's numbers and carries out its own part. A plan moves whole pages: to who
waits for one wholly within its share, or, from who holds one wholly beyond its own, for one across
its share's edge. Who gave a page is then not entitled to get one back: no page goes to and fro.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvcached.units import round_up

WEIGHT_UNIT = 1_000_000
"""The fixed-point unit of weights: a weight of 1."""


def fixed_weight(weight: float) -> int:
    """A weight as the ledger stores it, in fixed point; at least the smallest step."""
    return max(1, round(weight * WEIGHT_UNIT))


@dataclass(frozen=True, slots=True)
class Standing:
    """One account as the policy sees it. All sizes are bytes.

    ``charge`` is what the ledger charges; ``in_use``, ``cached`` and ``warm`` are the parts of it
    that will stay. The rest of the charge is on its way out.
    """

    guarantee: int = 0
    """What it is sure of, its pinned page included."""
    limit: int | None = None
    """The most that it may hold; 0 drains it."""
    weight: int = WEIGHT_UNIT
    """In millionths; see ``fixed_weight``."""
    charge: int = 0
    in_use: int = 0
    cached: int = 0
    """Unused whole pages with cached blocks."""
    warm: int = 0
    demand: int = 0
    """What it wants on top of all that it has; it could not be leased."""
    page: int = 1
    """The size of its pages; 1 where it is not known."""
    working: bool = False
    """Requests run on it: its cached blocks are its working set."""

    @property
    def unused(self) -> int:
        """What it can give back at once: warm pages first, then the cached ones."""
        return self.cached + self.warm

    @property
    def held(self) -> int:
        """What it has and keeps."""
        return min(self.charge, self.in_use + self.unused)

    @property
    def want(self) -> int:
        """What it has use for.

        Who waits for more would use all that it has: a demand counts only what is missing beyond
        its own unused blocks. The cache of an engine at work is part of what it works with; that
        of an engine at rest is memory which others may have.
        """
        if self.demand > 0:
            return self.charge + self.demand
        return self.held - self.warm if self.working else min(self.in_use, self.held)

    @property
    def floor(self) -> int:
        """What is kept for it whether it wants it or not."""
        return self.guarantee if self.limit is None else min(self.guarantee, self.limit)

    @property
    def claim(self) -> int:
        """What nobody else can have: what it holds, or is sure of."""
        return max(self.held, self.floor)

    def within(self, share: int) -> int:
        """The whole pages that lie within ``share``, in bytes."""
        return share // self.page * self.page

    def edge(self, share: int) -> int:
        """The whole pages that ``share`` reaches into, in bytes."""
        edge = round_up(share, self.page)
        return edge if self.limit is None else min(edge, self.within(self.limit))

    def above(self, size: int, up: bool = False) -> int:
        """The whole pages that it holds beyond ``size`` bytes; ``up`` counts one across it."""
        beyond = max(0, self.held - size)
        return round_up(beyond, self.page) if up else self.within(beyond)

    def wanted(self, size: int) -> int:
        """Bytes that it waits for on top of its claim, up to ``size`` bytes in all."""
        return max(0, min(self.charge + self.demand, size) - self.claim) if self.demand else 0


@dataclass(frozen=True, slots=True)
class Target:
    """What an account should do now. All sizes are bytes."""

    share: int
    """Its fair share."""
    give: int
    """Unused memory to give back: warm pages, then cached blocks."""
    owed: int
    """Memory in use that others wait for: to be given back as requests end."""
    grant: int
    """What it may lease now, as far as memory is free."""
    coming: int = 0
    """Unused memory that the others are to give back now."""


def fair_shares(lendable: int, standings: Sequence[Standing]) -> list[int]:
    """The weighted max-min fair share of each account, in bytes.

    ``lendable`` is the device's capacity less its headroom. Shares lie between floor and limit,
    never above what is wanted unless the floor is, and add up to what can be lent or to all that
    is wanted, whichever is less (rounding leaves less than a byte an account). Floors that do not
    fit, which the ledger refuses to set, are returned as they are.

    Accounts whose proportional part lies outside their bounds are settled at the bound, those on
    the side that weighs more first, and the rest is divided anew among the others. This is how
    CSS resolves flexible lengths (CSS Flexible Box Layout, section 9.7).
    """
    low = [standing.floor for standing in standings]
    high = [
        max(each.floor, each.want if each.limit is None else min(each.want, each.limit))
        for each in standings
    ]
    if sum(low) >= lendable:
        return low
    if sum(high) <= lendable:
        return high
    shares = low[:]
    left, unsettled = lendable, list(range(len(standings)))
    while unsettled:
        total = sum(standings[i].weight for i in unsettled)
        part = {i: left * standings[i].weight for i in unsettled}  # times 1 / total
        under = [i for i in unsettled if part[i] < low[i] * total]
        over = [i for i in unsettled if part[i] > high[i] * total]
        balance = sum(low[i] * total - part[i] for i in under) - sum(
            part[i] - high[i] * total for i in over
        )
        settled = {i: low[i] for i in under} if balance >= 0 else {}
        if balance <= 0:
            settled.update((i, high[i]) for i in over)
        if not settled:  # nobody is outside its bounds
            settled = {i: part[i] // total for i in unsettled}
        for i, share in settled.items():
            shares[i] = share
            left -= share
        unsettled = [i for i in unsettled if i not in settled]
    return shares


def reclaim(
    lendable: int, standings: Sequence[Standing], shares: Sequence[int]
) -> list[tuple[int, int]]:
    """What each account gives back now, and what it owes of its memory in use (``Target``).

    Who is above its limit gives back in any case. Room is needed for every floor and for what is
    wanted in whole pages within fair shares; it comes from those above their fair shares, most
    above first: what is unused, then, as a debt, memory in use. Nobody is taken below the last
    whole page of its share, or below its guarantee. At last those that hold pages wholly beyond
    their shares give them to those that wait for one across theirs.

    So few give much: who has only its warm pages is not woken for them while another's cache is
    enough. Waking costs more than a page is worth.
    """
    pairs = list(zip(standings, shares, strict=True))
    above = [each.above(max(each.within(share), each.floor)) for each, share in pairs]
    taken = [
        _from_one(each, 0 if each.limit is None else min(most, each.above(each.limit, up=True)))
        for each, most in zip(standings, above, strict=True)
    ]
    need = sum(each.claim + each.wanted(each.within(share)) for each, share in pairs) - lendable
    _take(standings, taken, above, need)

    edges = _edges_in_reach(lendable, standings, shares)
    if edges:
        beyond = [
            max(sum(parts), each.above(max(share, each.floor)))
            for (each, share), parts in zip(pairs, taken, strict=True)
        ]
        _take(standings, taken, beyond, need + sum(edges.values()))
    return [(unused, in_use) for unused, in_use in taken]


def _edges_in_reach(
    lendable: int, standings: Sequence[Standing], shares: Sequence[int]
) -> dict[int, int]:
    """By account: what it waits for across its share's edge, where there is enough for that.

    Smallest first, of what is free and what others hold in pages wholly beyond their shares: a
    part of a page helps nobody.
    """
    left = lendable
    edges = []
    for i, (each, share) in enumerate(zip(standings, shares, strict=True)):
        within = each.wanted(each.within(share))
        left -= each.claim + within - each.above(max(share, each.floor))
        edges.append((each.wanted(each.edge(share)) - within, i))
    reached = {}
    for size, i in sorted(edges):
        left -= size
        if size > 0 and left >= 0:
            reached[i] = size
    return reached


def _from_one(standing: Standing, size: int) -> list[int]:
    """``size`` bytes of one account: of its unused memory, and of that in use."""
    unused = min(standing.unused, size)
    return [unused, min(standing.in_use, size - unused)]


def _take(
    standings: Sequence[Standing], taken: list[list[int]], most: Sequence[int], need: int
) -> None:
    """Raises ``taken`` (by account: unused, in use) until it adds up to ``need``.

    No account gives more than its ``most`` in all. Debts count only once no memory is left that
    comes back at once: what is owed above a limit saves nobody's cache today.
    """
    first = sorted(range(len(standings)), key=lambda i: (sum(taken[i]) - most[i], i))
    for kind in range(2):
        missing = need - sum(sum(parts[: kind + 1]) for parts in taken)
        for i in first:
            if missing <= 0:
                break
            each = standings[i]
            there = (each.unused, each.in_use)[kind] - taken[i][kind]
            there = each.within(max(0, min(there, most[i] - sum(taken[i]))))
            size = min(there, round_up(missing, each.page))
            taken[i][kind] += size
            missing -= size


def grant(lendable: int, standings: Sequence[Standing], shares: Sequence[int], index: int) -> int:
    """Bytes that the account at ``index`` may lease now, as far as memory is free.

    Always what lies wholly within its share. Then one page across its share's edge, once what
    the others wait for within theirs is set aside. And beyond that, whatever nobody else is
    entitled to and waits for. So an endless demand gets all that is idle and starves nobody.
    """
    own, share = standings[index], shares[index]
    in_reach = _edges_in_reach(lendable, standings, shares)
    spare = lendable - own.held - sum(each.claim for i, each in enumerate(standings) if i != index)
    edges = {}
    for i, (each, theirs) in enumerate(zip(standings, shares, strict=True)):
        if i != index and each.demand > 0:
            within = each.wanted(each.within(theirs))
            spare -= within
            edges[i] = each.wanted(each.edge(theirs)) - within
    by_right = own.within(share) - own.held
    to_the_edge = min(own.edge(share) - own.held, spare)
    # A page that does not fit, and for which nobody gives, helps nobody by waiting.
    beyond = spare - sum(edge for i, edge in edges.items() if edge <= spare or i in in_reach)
    granted = max(0, by_right, to_the_edge, beyond)
    return granted if own.limit is None else max(0, min(granted, own.limit - own.held))


def target(lendable: int, standings: Sequence[Standing], index: int) -> Target:
    """All that the account at ``index`` should know. ``lendable`` is as in ``fair_shares``."""
    shares = fair_shares(lendable, standings)
    plan = reclaim(lendable, standings, shares)
    give, owed = plan[index]
    coming = sum(size for size, _ in plan) - give
    return Target(shares[index], give, owed, grant(lendable, standings, shares, index), coming)
