"""kvtop: its numbers and bars, its screen by textual's own pilot, ``--once`` for logs."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from page_pools import PAGE, PER_PAGE
from played_engine import Engine
from programs import DEVICE, PAGES
from textual.pilot import Pilot
from textual.widgets import DataTable, Input, Static

from kvcached.cli.top import text
from kvcached.cli.top.app import KvTop
from kvcached.cli.top.command import set_limit
from kvcached.cli.top.rates import Looks, ordered
from kvcached.ledger import Ledger
from kvcached.observe import Observer

Test = Callable[[KvTop, Pilot[None]], Awaitable[None]]


def on_screen(folder: Path, test: Test, size: tuple[int, int] = (80, 24)) -> None:
    """Runs a test on a screen of this size; the screen looks only when it is told to."""

    async def run() -> None:
        with Observer(folder) as observer:
            app = KvTop(observer, 3600, set_limit)
            async with app.run_test(size=size) as pilot:
                await pilot.pause()
                await test(app, pilot)

    asyncio.run(run())


def rows(app: KvTop) -> list[str]:
    table = app.query_one("#table", DataTable)
    return [
        "".join(cell.plain for cell in table.get_row_at(index)) for index in range(table.row_count)
    ]


def said(app: KvTop, where: str) -> str:
    return str(app.query_one(where, Static).content)


async def type_in(pilot: Pilot[None], key: str, words: str) -> None:
    await pilot.press(key)
    for letter in words:
        await pilot.press({"%": "percent_sign"}.get(letter, letter))
    await pilot.press("enter")
    await pilot.pause()


def test_the_screen_shows_the_ledgers_numbers(
    folder: Path, ledger: Ledger, engines: dict[str, Engine]
) -> None:
    now = ledger.snapshot()

    async def test(app: KvTop, pilot: Pilot[None]) -> None:
        assert said(app, "#title") == (f"{DEVICE}  2 MiB, free {now.free // 1024} KiB, 2 instances")
        chat, code = rows(app)
        assert len(chat) == len(code) == 80
        assert chat.split()[0] == "chat" and code.split()[0] == "code"
        for row, name in ((chat, "chat"), (code, "code")):
            account = now.account(name)
            assert account is not None and text.short_size(account.charge) in row.split()
        assert said(app, "#spark")[-1] in text.SPARKS

    on_screen(folder, test)


def test_bars_are_to_scale(folder: Path, ledger: Ledger, engines: dict[str, Engine]) -> None:
    ledger.set_guarantee("chat", 2 * PAGE)
    ledger.set_limit("chat", 24 * PAGE)
    (view,) = Looks().take([ledger.snapshot()], 0.0)
    line = next(line for line in view.lines if line.account.name == "chat")
    account = line.account
    assert (account.in_use, account.cached) == (4 * PAGE, 12 * PAGE)
    used, rest = text.IN_USE * 4, text.FREE * 8
    assert account.charge == 16 * PAGE
    expected = used + text.CACHED * 12 + rest + text.BEYOND * 8
    expected = expected[:2] + text.GUARANTEE + expected[3:24] + text.LIMIT + expected[25:]
    assert text.bar(line, PAGES) == expected


def test_a_sign_says_what_is_not_at_work(folder: Path, ledger: Ledger) -> None:
    def name() -> str:
        (view,) = Looks().take([ledger.snapshot()], 0.0)
        return next(text.name_of(each) for each in view.lines if "sleepy" in each.account.name)

    with ledger.join("sleepy", "sleepy") as account:
        assert name() == "~sleepy"
        account.set_ready()
        assert name() == "sleepy"
        account.set_asleep(True)
        assert name() == "zsleepy"
        account.set_asleep(False)
        assert name() == "sleepy"


def test_rates_are_pages_a_second(folder: Path, ledger: Ledger, engines: dict[str, Engine]) -> None:
    looks = Looks()
    looks.take([ledger.snapshot()], 10.0)
    one = engines["code"].one
    before = one.member.core.held()
    one.alloc(6 * PER_PAGE)
    one.carry()
    came = (one.member.core.held() - before) // PAGE
    assert came > 0
    other = ledger.join("other", "other")
    ledger.set_limit("other", 0)
    for _ in range(8):
        assert not other.lease(PAGE)
    (view,) = looks.take([ledger.snapshot()], 12.0)
    rates = {line.account.name: line.rates for line in view.lines}
    assert rates["code"].mapped == came / 2 and rates["chat"].mapped == 0
    assert rates["other"].refused == 0, "it was not there at the look before"
    for _ in range(8):
        assert not other.lease(PAGE)
    (view,) = looks.take([ledger.snapshot()], 14.0)
    rates = {line.account.name: line.rates for line in view.lines}
    assert rates["other"].refused == 4 and rates["code"].mapped == 0
    assert [line.account.name for line in ordered(view.lines, "name")] == ["chat", "code", "other"]
    assert [line.account.name for line in ordered(view.lines, "charge", "O")] == ["code", "other"]
    other.close()


def test_a_limit_is_set_from_the_keyboard(
    folder: Path, ledger: Ledger, engines: dict[str, Engine]
) -> None:
    async def test(app: KvTop, pilot: Pilot[None]) -> None:
        await pilot.press("down")
        await type_in(pilot, "l", "25%")
        assert said(app, "#said") == "code: limit 512 KiB"
        account = ledger.snapshot().account("code")
        assert account is not None and account.limit == PAGES * PAGE // 4
        assert "512K" in rows(app)[1]
        await type_in(pilot, "l", "much")
        assert "'much'" in said(app, "#said")
        await pilot.press("l", "5", "escape")
        assert not app.query_one("#ask", Input).has_class("shown")
        assert ledger.snapshot().account("code") == account
        await type_in(pilot, "l", "none")
        assert ledger.snapshot().accounts[1].limit is None

    on_screen(folder, test)


def test_sort_and_filter(folder: Path, ledger: Ledger, engines: dict[str, Engine]) -> None:
    def names(app: KvTop) -> list[str]:
        return [row.split()[0] for row in rows(app)]

    async def test(app: KvTop, pilot: Pilot[None]) -> None:
        engines["code"].one.account.set_demand(4 * PAGE)
        app.look()
        assert names(app) == ["chat", "code"]
        await pilot.press("s")
        assert said(app, "#said") == "sorted by demand" and names(app) == ["code", "chat"]
        await type_in(pilot, "slash", "ha")
        assert names(app) == ["chat"]
        await pilot.press("slash", "ctrl+u", "enter")
        await pilot.pause()
        assert names(app) == ["code", "chat"]
        engines["code"].one.account.set_demand(0)

    on_screen(folder, test)


def test_it_follows_instances_and_devices(
    folder: Path, ledger: Ledger, engines: dict[str, Engine]
) -> None:
    async def test(app: KvTop, pilot: Pilot[None]) -> None:
        await pilot.press("down")
        late = ledger.join("aaa", "a\x1b[2Jlate")
        app.look()
        assert len(rows(app)) == 3 and "\x1b" not in "".join(rows(app))
        assert app.query_one("#table", DataTable).cursor_row == 1, "the cursor stays where it was"
        late.close()
        with Ledger.open(folder, "host:aaa", PAGE):
            app.look()
            assert said(app, "#title").startswith("host:aaa") and "[1/2]" in said(app, "#title")
            assert rows(app) == []
            await pilot.press("l")
            assert not app.query_one("#ask", Input).has_class("shown")
            await pilot.press("d")
            assert said(app, "#title").startswith(DEVICE) and len(rows(app)) == 2

    on_screen(folder, test)


def test_only_changed_cells_are_drawn_again(
    folder: Path, ledger: Ledger, engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(app: KvTop, pilot: Pilot[None]) -> None:
        changed = []
        table = app.query_one("#table", DataTable)
        update = table.update_cell
        monkeypatch.setattr(
            table, "update_cell", lambda row, column, cell: changed.append((row, column)) or
            update(row, column, cell)
        )  # fmt: skip
        monkeypatch.setattr(table, "clear", lambda **_: pytest.fail("drawn anew"))
        app.look()
        assert changed == []
        ledger.set_limit("chat", 20 * PAGE)
        app.look()
        assert set(changed) == {("chat", "limit"), ("chat", "memory")}

    on_screen(folder, test)


@pytest.mark.parametrize("size", [(80, 24), (140, 40), (60, 12)])
def test_screens_of_all_sizes(
    folder: Path, ledger: Ledger, engines: dict[str, Engine], size: tuple[int, int]
) -> None:
    async def test(app: KvTop, pilot: Pilot[None]) -> None:
        table = app.query_one("#table", DataTable)
        assert table.row_count == 2 and len(rows(app)[0]) == max(size[0], 71)
        assert table.show_vertical_scrollbar is False

    on_screen(folder, test, size)


def kvtop(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvcached.cli.top.command", *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "KVCACHED_DIR": str(folder)},
    )


def test_once_prints_what_the_ledger_says(
    folder: Path, ledger: Ledger, engines: dict[str, Engine]
) -> None:
    done = kvtop(folder, "--once", "-n", "0.1")
    assert done.returncode == 0, done.stderr
    _, title, headings, chat, code = done.stdout.splitlines()
    assert title.startswith(f"{DEVICE}  2 MiB") and headings.startswith("instance")
    assert chat.startswith("chat") and code.startswith("code")
    charge = ledger.snapshot().accounts[0].charge
    assert chat.split()[-2:] == [text.short_size(charge), "-"]
    assert all(len(line) <= 80 for line in done.stdout.splitlines())


WITH_A_TERMINAL = """
import os, pty, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
pid, terminal = pty.fork()
if pid == 0:
    signal.alarm(20)  # outlives the exec
    os.execv(sys.argv[1], sys.argv[1:])
seen = b""
while b"chat" not in seen:
    seen += os.read(terminal, 4096)
os.close(terminal)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_a_screen_ends_with_its_terminal(
    folder: Path, ledger: Ledger, engines: dict[str, Engine]
) -> None:
    """Also where whoever started it ignores hang-ups, as nohup does."""
    command = [sys.executable, "-m", "kvcached.cli.top.command"]
    done = subprocess.run(
        [sys.executable, "-c", WITH_A_TERMINAL, *command],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "KVCACHED_DIR": str(folder), "TERM": "xterm-256color"},
    )
    assert done.stdout.split() == [str(-signal.SIGHUP)], done.stderr


def test_wrong_use_is_one_line(folder: Path, tmp_path: Path) -> None:
    for arguments, code, words in (
        (("--once",), 1, "no device is shared here"),
        ((), 2, "kvtop --once"),
        (("-n", "0"), 2, "--interval"),
        (("--device", "nowhere", "--once"), 2, "expected host:NAME"),
    ):
        done = kvtop(folder, *arguments)
        assert done.returncode == code and words in done.stderr
        assert done.stderr.count("\n") == 1


def test_help_has_examples(folder: Path) -> None:
    done = kvtop(folder, "--help")
    assert done.returncode == 0 and "kvtop --once" in done.stdout
