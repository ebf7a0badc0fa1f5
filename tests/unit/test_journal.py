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
DEVICE = "host:journal"


def test_every_kind_of_event_has_a_level() -> None:
    assert LEVELS.keys() == KINDS.keys()


def test_a_line_a_noteworthy_event(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kvcached")
    now_s = 0.0
    with Ledger.open(tmp_path / "ledger", DEVICE, CAPACITY) as ledger:
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
        changed = "kvcached: host:journal: chat: limit (before none, after 10 MiB)"
        assert lines() == [(logging.INFO, changed)]
        remote = Remote(tmp_path / "ledger", DEVICE)
        remote.run("account = ledger.join('other', 'code')", "account.set_ready()")
        ((level, text),) = lines()
        assert level == logging.INFO and text.startswith(
            "kvcached: host:journal: code: joined (pid"
        )
        ledger.set_limit("other", MIB)
        remote.run("account.set_demand(2 << 20)", "account.lease(2 << 20)")
        assert lines() == [], "what others may and want is in their own logs"
        mine.set_demand(20 * MIB)
        assert not mine.lease(20 * MIB)
        refused = "kvcached: host:journal: chat: refused (count 1, demand 20 MiB)"
        assert lines() == [(logging.INFO, refused)]
        remote.kill()
        wait_until(lambda: not ledger.snapshot().accounts[1].alive)
        died = f"kvcached: host:journal: code: died (pid {remote.pid})"
        assert lines() == [(logging.WARNING, died)]
        ledger.reap()
        ((level, text),) = lines()
        assert level == logging.INFO and "code: reaped" in text
        mine.close()
    now_s += 1.0
    journal.look()  # the ledger is closed: no word, no error


def test_another_ledger_for_the_same_device_is_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As of a container that mounts another folder."""
    device = "GPU-0a1b2c3d-twice"
    remote = Remote(tmp_path / "elsewhere", device)
    remote.run("account = ledger.join('other', 'code')")
    now_s = 0.0
    with Ledger.open(tmp_path / "ledger", device, CAPACITY) as ledger:
        neighbour = Remote(tmp_path / "ledger", device)
        neighbour.run("account = ledger.join('n', 'n')")
        journal = Journal(ledger, "me", lambda: now_s)
        for _ in range(2):
            now_s += 1
            journal.look()
        warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        (text,) = warnings
        assert f"processes {remote.pid} use another ledger for {device}" in text
        assert str(tmp_path / "elsewhere") in text and str(neighbour.pid) not in text
        neighbour.kill()
    remote.kill()
