"""The Python API of operators: the examples of its page, and what their words promise."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from page_pools import PAGE
from played_engine import Engine

import kvcached
from kvcached.control import Pool
from kvcached.errors import ConfigError, InvalidArgumentError, LedgerError
from kvcached.ledger import Ledger

PAGES = 16
PAGE_OF_DOCS = Path(__file__).resolve().parents[2] / "docs" / "python-api.md"


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    monkeypatch.setenv("KVCACHED_DIR", str(tmp_path / "ledger"))
    monkeypatch.delenv("KVCACHED_DEVICE", raising=False)
    with Ledger.open(tmp_path / "ledger", "host:test", PAGES * PAGE) as opened:
        yield opened


@pytest.fixture
def engine(ledger: Ledger) -> Iterator[Engine]:
    played = Engine(ledger, "chat", cached_pages=8, used_pages=4)
    yield played
    played.close()


@pytest.fixture
def pool(ledger: Ledger) -> Iterator[Pool]:
    with kvcached.open_pool() as opened:
        yield opened


def test_the_examples_of_the_page_run(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    examples = re.findall(r"```python\n(.*?)```", PAGE_OF_DOCS.read_text(), re.DOTALL)
    assert len(examples) == 6
    scope: dict[str, object] = {}
    for example in examples:
        exec(example, scope)
    out = capsys.readouterr().out
    assert "host:test: 196608 of 1048576 bytes are free" in out
    assert "has no instance chart; there are: chat" in out and "'much'" in out


def test_amounts_are_bytes_or_words(engine: Engine, pool: Pool) -> None:
    for amount, size in ((8 * PAGE, 8 * PAGE), ("512KiB", 8 * PAGE), ("75%", 12 * PAGE)):
        assert pool.set_limit("chat", amount).account.limit == size
    for amount in (-1, 1 << 63, "5 apples", "101%", "nan%"):
        with pytest.raises((InvalidArgumentError, ConfigError)):
            pool.set_limit("chat", amount)
    with pytest.raises(InvalidArgumentError):
        pool.set_weight("chat", float("nan"))


def test_an_effect_says_what_is_left_to_do(engine: Engine, pool: Pool) -> None:
    effect = pool.set_limit("chat", 0, wait_s=0.2)
    assert (effect.account.charge, effect.above) == (5 * PAGE, 4 * PAGE)
    assert pool.instance("chat").above == 4 * PAGE
    pool.set_limit("chat", None)
    other = pool.ledger.join("other", "other")
    effect = pool.set_guarantee("other", 14 * PAGE, wait_s=0.2)
    assert effect.missing == 3 * PAGE == pool.snapshot().missing
    other.close()


def test_a_pool_for_reading_changes_nothing(engine: Engine, ledger: Ledger) -> None:
    with kvcached.open_pool("host:test", read_only=True) as pool:
        assert pool.snapshot().accounts[0].name == "chat"
        with pytest.raises(LedgerError, match="reading only"):
            pool.set_limit("chat", 0)
    with pytest.raises(LedgerError, match="closed"):
        pool.snapshot()


def test_a_device_that_nobody_shares_is_an_error(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="no ledger"):
        kvcached.open_pool("host:none")
    with pytest.raises(ConfigError, match="expected host:NAME"):
        kvcached.open_pool("host none")
