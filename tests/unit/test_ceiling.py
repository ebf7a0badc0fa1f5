"""Whether a prompt can ever fit, as a front end asks for every request."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kvcached.engines.ceiling import FRESH_S, Ceiling, Excess
from kvcached.ledger import Ledger

BLOCK, PAGE, TOKENS = 4096, 4 * 4096, 16
CAPACITY = 10 * PAGE


def fits(ceiling: Ceiling, tokens: int) -> bool:
    return ceiling.exceeded(tokens) is None


def test_a_prompt_and_one_token_fit_into_all_blocks_but_the_engines_own(tmp_path: Path) -> None:
    with Ledger.open(tmp_path, "host:one", CAPACITY) as ledger:
        ceiling = Ceiling([ledger], "me")
        assert fits(ceiling, 1 << 40), "there is no such instance yet"
        account = ledger.join("me", "chat")
        assert fits(ceiling, 1 << 40), "it has not said yet what its blocks are"
        account.describe(BLOCK, TOKENS, PAGE)
        assert fits(ceiling, 39 * TOKENS - 1)
        excess = ceiling.exceeded(39 * TOKENS)
        assert isinstance(excess, Excess)
        assert (excess.blocks, excess.most, excess.account.name) == (40, 39, "chat")


def test_what_was_read_serves_for_a_yes_for_a_moment_and_never_for_a_no(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = 0
    original = Ledger.snapshot

    def counted(self: Ledger) -> Any:
        nonlocal reads
        reads += 1
        return original(self)

    monkeypatch.setattr(Ledger, "snapshot", counted)
    now_s = 0.0
    with Ledger.open(tmp_path, "host:one", CAPACITY) as ledger:
        account = ledger.join("me", "chat")
        account.describe(BLOCK, TOKENS, PAGE)
        ceiling = Ceiling([ledger], "me", lambda: now_s)
        assert all(fits(ceiling, 100) for _ in range(50)) and reads == 1
        ledger.set_limit("me", 2 * PAGE)
        assert fits(ceiling, 30 * TOKENS), "the scheduler finds it"
        assert not fits(ceiling, 39 * TOKENS) and reads == 2
        assert not fits(ceiling, 30 * TOKENS) and reads == 3
        ledger.set_limit("me", 5 * PAGE)
        assert fits(ceiling, 18 * TOKENS), "at once, where more is allowed"
        ledger.set_limit("me", 2 * PAGE)
        now_s += FRESH_S
        assert not fits(ceiling, 18 * TOKENS)


def test_of_several_devices_the_one_that_can_give_least_counts(tmp_path: Path) -> None:
    with ExitStack() as stack:
        ledgers = [
            stack.enter_context(Ledger.open(tmp_path, f"host:{name}", pages * PAGE))
            for name, pages in (("large", 10), ("small", 3), ("empty", 1))
        ]
        accounts = [ledger.join("me", "chat") for ledger in ledgers[:2]]
        for account in accounts:
            account.describe(BLOCK, TOKENS, PAGE)
        ceiling = Ceiling(ledgers, "me")
        assert fits(ceiling, 11 * TOKENS - 1)
        excess = ceiling.exceeded(11 * TOKENS)
        assert excess is not None and (excess.blocks, excess.most) == (12, 11)
