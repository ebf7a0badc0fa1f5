"""What several unit tests use."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from kvctl_runs import Ran, Run

from kvcached.cli import kvctl


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs ``kvctl`` in this process."""

    def call(*arguments: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["kvctl", *arguments])
        with pytest.raises(SystemExit) as ended:
            kvctl.main()
        out, err = capsys.readouterr()
        return Ran(int(ended.value.code or 0), out, err)

    return call


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's ledgers lie, also for the tools that it calls."""
    monkeypatch.setenv("KVCACHED_DIR", str(tmp_path / "ledger"))
    monkeypatch.delenv("KVCACHED_DEVICE", raising=False)
    return tmp_path / "ledger"
