"""What an engine's log says about its ledger, and how loudly."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from ledger_process import CAPACITY, Remote, wait_until

from kvcached.events import KINDS
from kvcached.journal import LEVELS, Journal
from kvcached.ledger import Ledger

MIB = 1 << 20


def test_every_kind_of_event_has_a_level() -> None:
    assert LEVELS.keys() == KINDS.keys()


def test_a_line_a_noteworthy_event(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kvcached")
    now_s = 0.0
    with Ledger.open(tmp_path / "ledger", "host:test", CAPACITY) as ledger:
        mine = ledger.join("me", "chat")
        journal = Journal(ledger, "me", lambda: now_s)

        def lines() -> list[tuple[int, str]]:
            nonlocal now_s
            now_s += 1.0
            caplog.clear()
            journal.look()
            return [(record.levelno, record.getMessage()) for record in caplog.records]

        assert lines() == []
        ledger.set_limit("me", 10 * MIB)
        caplog.clear()
        journal.look()
        assert caplog.records == [], "it looked less than a second ago"
        changed = "kvcached: host:test: chat: limit (before none, after 10 MiB)"
        assert lines() == [(logging.INFO, changed)]
        remote = Remote(tmp_path / "ledger")
        remote.run("account = ledger.join('other', 'code')", "account.set_ready()")
        ((level, text),) = lines()
        assert level == logging.INFO and text.startswith("kvcached: host:test: code: joined (pid")
        ledger.set_limit("other", MIB)
        remote.run("account.set_demand(2 << 20)", "account.lease(2 << 20)")
        assert lines() == [], "what others may and want is in their own logs"
        mine.set_demand(20 * MIB)
        assert not mine.lease(20 * MIB)
        refused = "kvcached: host:test: chat: refused (count 1, demand 20 MiB)"
        assert lines() == [(logging.INFO, refused)]
        remote.kill()
        wait_until(lambda: not ledger.snapshot().accounts[1].alive)
        died = f"kvcached: host:test: code: died (pid {remote.pid})"
        assert lines() == [(logging.WARNING, died)]
        ledger.reap()
        ((level, text),) = lines()
        assert level == logging.INFO and "code: reaped" in text
        mine.close()
    now_s += 1.0
    journal.look()  # the ledger is closed: no word, no error
