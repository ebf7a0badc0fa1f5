"""A ledger with two engines that are played, for the tools that look at it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "unit"))  # played_engine, page_pools

from page_pools import PAGE
from played_engine import Engine
from programs import DEVICE, PAGES

from kvcached.ledger import Ledger


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVCACHED_DIR", str(tmp_path / "ledger"))
    monkeypatch.delenv("KVCACHED_DEVICE", raising=False)
    return tmp_path / "ledger"


@pytest.fixture
def ledger(folder: Path) -> Iterator[Ledger]:
    with Ledger.open(folder, DEVICE, PAGES * PAGE) as opened:
        yield opened


@pytest.fixture
def engines(ledger: Ledger) -> Iterator[dict[str, Engine]]:
    """chat: 12 cached pages and 3 in use; code: 2 and 4."""
    played = {
        "chat": Engine(ledger, "chat", cached_pages=12, used_pages=3),
        "code": Engine(ledger, "code", cached_pages=2, used_pages=4),
    }
    for engine in played.values():
        engine.one.account.set_ready()
    yield played
    for engine in played.values():
        engine.close()
