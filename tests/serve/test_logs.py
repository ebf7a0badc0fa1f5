"""What engines print."""

from __future__ import annotations

from pathlib import Path

from kvcached.router.logs import MAX_LINE, EngineLog
from kvcached.router.settings import LogSettings


def test_lines_arrive_whole_however_they_are_cut() -> None:
    shown: list[str] = []
    log = EngineLog("a", LogSettings(), shown.append)
    for piece in (b"one\ntw", b"o\r\n", b"\xff\n", b"x" * (MAX_LINE + 5), b"\nlast"):
        log.take(piece)
    log.end()
    log.end()
    whole = ["one", "two", "\ufffd", "x" * MAX_LINE, "xxxxx", "last"]
    assert shown == [f"[a] {line}" for line in whole]
    assert log.tail(2) == "xxxxx\nlast"
    log.begin()
    assert log.tail(2) == ""


def test_files_rotate(tmp_path: Path) -> None:
    settings = LogSettings(folder=tmp_path / "logs", max_size=4096, files=2)
    log = EngineLog("org/a", settings, lambda _: None)
    for number in range(1000):
        log.take(f"line {number}\n".encode())
    log.close()
    files = sorted(path.name for path in (tmp_path / "logs").iterdir())
    assert files == ["org-a.log", "org-a.log.1", "org-a.log.2"]
    assert (tmp_path / "logs" / "org-a.log").read_text().splitlines()[-1] == "line 999"
    assert all(path.stat().st_size <= 4096 for path in (tmp_path / "logs").iterdir())
