"""Every tool of the operators, used while two real engines work under one budget."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from harness import Load, Pair, environment, wait_until
from prometheus_client.parser import text_string_to_metric_families
from test_operator import kvctl
from test_sharing import fill_with_cache

from kvcached.control import Pool
from kvcached.ledger import Ledger
from kvcached.snapshot import LedgerSnapshot
from kvcached.units import format_size

sys.path.append(str(Path(__file__).resolve().parents[1] / "operators"))

from programs import browser, exporter

TOKEN = "correct-horse-battery"
Value = TypeVar("Value")


def tool(pair: Pair, module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"kvcached.cli.{module}", *arguments]


def surroundings(pair: Pair) -> dict[str, str]:
    where = {"KVCACHED_DIR": str(pair.ledger.path.parent), "KVCACHED_DEVICE": pair.ledger.device}
    return environment(where)


def say(pair: Pair, module: str, *arguments: str) -> str:
    done = subprocess.run(
        tool(pair, module, *arguments), capture_output=True, text=True, env=surroundings(pair)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def address(pair: Pair, tmp_path: Path) -> Iterator[str]:
    (tmp_path / "token").write_text(TOKEN)
    arguments = ("--token-file", str(tmp_path / "token"), "--interval", "0.2")
    with exporter(pair.ledger.path.parent, tmp_path / "log", *arguments) as url:
        yield url


class Events:
    """``kvctl watch --events --json`` beside the engines, for as long as the block runs."""

    def __init__(self, pair: Pair) -> None:
        command = tool(pair, "kvctl", "watch", "-n", "0.05", "--events", "--json")
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=surroundings(pair)
        )
        self.found: list[dict[str, Any]] = []

    def __enter__(self) -> Events:
        assert self._process.stdout is not None
        self.found.append(json.loads(self._process.stdout.readline()))
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        out, _ = self._process.communicate()
        self.found += [json.loads(line) for line in out.splitlines()]

    def kinds_of(self, name: str) -> set[str]:
        return {event["event"] for event in self.found if event["name"] == name}


def steady(pair: Pair, look: Callable[[], Value]) -> tuple[Value, LedgerSnapshot]:
    """What a tool shows, and the ledger at that very moment: it was the same before and after."""
    end_s = time.monotonic() + 60
    while time.monotonic() < end_s:
        before = pair.ledger.snapshot()
        seen = look()
        if pair.ledger.snapshot() == before:
            return seen, before
    raise AssertionError("the ledger never came to rest")


def test_every_command_while_two_engines_work(
    pair: Pair, plain: list[list[int]], address: str
) -> None:
    page = pair.account(pair.a).page_bytes
    with Events(pair) as events, Load(pair.a, 4) as a, Load(pair.b, 4) as b:
        wait_until(lambda: len(a.answers) > 3 and len(b.answers) > 3, 120, "both work")
        try:
            (listed,) = kvctl(pair, "list")["devices"]
            assert {each["name"] for each in listed["accounts"]} == {"a", "b"}
            assert listed["charge"] <= pair.capacity == listed["capacity"]
            text = say(pair, "kvctl", "watch", "-n", "0.1", "--count", "3")
            assert text.count(pair.ledger.device) == 3
            # Lowered under load: what runs goes on, and the charge follows as requests end. The
            # longest request needs 9 pages: it still fits.
            start_s = time.monotonic()
            lowered = kvctl(pair, "limit", "a", f"{12 * page}")
            assert lowered["limit"] == 12 * page
            wait_until(lambda: pair.account(pair.a).above == 0, 60, "a is within its limit")
            print(f"within the new limit after {time.monotonic() - start_s:.2f} s")
            wait_until(lambda: ": a: limit (before none" in pair.a.log(), 20, "it is logged")
            answered = len(a.answers)
            wait_until(lambda: len(a.answers) > answered + 2, 60, "a answers under the limit")
            assert pair.account(pair.a).charge <= 12 * page
            assert kvctl(pair, "limit-percent", "a", "50")["limit"] == pair.capacity // 2
            assert kvctl(pair, "guarantee", "b", "10%")["guarantee"] == pair.capacity // 10
            assert kvctl(pair, "weight", "b", "2")["weight"] == 2
            assert kvctl(pair, "reclaim", "a", f"{page}")["answered"]
            assert kvctl(pair, "delete")["accounts"] == []
            assert "kvctl" in say(pair, "kvctl", "--help")
            healthy = json.loads(say(pair, "main", "doctor", "--engine", "vllm", "--json"))
            assert healthy["ok"] is True
            assert len(say(pair, "top.command", "--once", "-n", "0.2").splitlines()) == 5
            assert httpx.get(f"{address}/metrics").status_code == 200
            body = {"device": pair.ledger.device, "instance": "a", "limit": None}
            headers = {"Authorization": f"Bearer {TOKEN}"}
            assert httpx.post(f"{address}/api/v1/limit", json=body, headers=headers).is_success
            with opened(pair) as pool:
                assert pool.set_guarantee("b", 0).account.guarantee == 0
        finally:
            kvctl(pair, "limit", "a", "none")
            kvctl(pair, "guarantee", "b", "0")
            kvctl(pair, "weight", "b", "1")
    assert a.failures() + b.failures() == []
    assert a.wrong(plain) + b.wrong(plain) == [], "requests in flight lose nothing"
    assert events.kinds_of("a") >= {"joined", "ready", "limit"}
    assert events.kinds_of("b") >= {"joined", "guarantee", "weight"}


def opened(pair: Pair) -> Pool:
    """As ``kvcached.open_pool``, without this process's environment."""
    return Pool(Ledger.open(pair.ledger.path.parent, pair.ledger.device, create=False))


def test_every_tool_shows_what_the_ledger_says(pair: Pair, address: str) -> None:
    fill_with_cache(pair, pair.a)
    listed, now = steady(pair, lambda: kvctl(pair, "list")["devices"][0])
    for account in now.accounts:
        shown = next(each for each in listed["accounts"] if each["name"] == account.name)
        assert shown["charge"] == account.charge and shown["cached"] == account.cached
        assert len(shown["members"]) == len(account.members) == 1
    screen, now = steady(pair, lambda: say(pair, "top.command", "--once", "-n", "0.1"))
    for account in now.accounts:
        row = next(line for line in screen.splitlines() if line.startswith(f"{account.name} "))
        assert format_size(account.charge).replace(" ", "").replace("iB", "") in row
    metrics, now = steady(pair, lambda: httpx.get(f"{address}/metrics").text)
    charges = {
        sample.labels["name"]: sample.value
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
        if sample.name == "kvcached_instance_charged_bytes"
    }
    assert charges == {account.name: account.charge for account in now.accounts}


def test_the_page_follows_real_engines(pair: Pair, address: str) -> None:
    with ExitStack() as stack:
        page = stack.enter_context(browser()).new_page(viewport={"width": 1280, "height": 900})
        page.goto(address)
        page.wait_for_selector("tbody tr:nth-child(2)")
        with Load(pair.a, 4) as load:
            wait_until(lambda: len(load.answers) > 3, 120, "a works")
            page.locator("#token").fill(TOKEN)
            field = page.locator("tr", has_text="a").locator("td.limit input").first
            field.fill("50%")
            field.press("Enter")
            wait_until(lambda: pair.account(pair.a).limit == pair.capacity // 2, 10, "the limit")
            kvctl(pair, "limit", "a", "none")
        assert load.failures() == []

        def charges() -> list[str]:
            time.sleep(0.5)  # the page looks five times a second
            return list(page.locator("td.charge").all_inner_texts())

        shown, now = steady(pair, charges)
        assert shown == [format_size(account.charge) for account in now.accounts]


def test_the_screen_of_kvtop_beside_real_engines(pair: Pair) -> None:
    from textual.widgets import DataTable

    from kvcached.cli.top.app import KvTop
    from kvcached.cli.top.text import short_size
    from kvcached.observe import Observer

    async def run() -> None:
        with Observer(pair.ledger.path.parent) as observer:
            app = KvTop(observer, 0.1, lambda *_: "")
            async with app.run_test(size=(80, 24)) as pilot:
                with Load(pair.a, 2) as load:
                    while len(load.answers) < 4:
                        await pilot.pause(0.1)
                assert load.failures() == []
                end_s, equal = time.monotonic() + 60, False
                while not equal and time.monotonic() < end_s:
                    before = pair.ledger.snapshot()
                    app.look()
                    table = app.query_one("#table", DataTable)
                    cells = [table.get_row_at(row) for row in range(table.row_count)]
                    shown = {row[0].plain.strip(): row[2].plain.strip() for row in cells}
                    wanted = {each.name: short_size(each.charge) for each in before.accounts}
                    equal = shown == wanted and pair.ledger.snapshot() == before
                    await pilot.pause(0.1)
                assert equal, (shown, wanted)

    asyncio.run(run())
