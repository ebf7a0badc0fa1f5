"""The exporter's page in a real browser: it renders, follows the ledger, changes a limit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from page_pools import PAGE, PER_PAGE
from played_engine import Engine
from playwright.sync_api import Browser, Page, expect
from programs import DEVICE, PAGES, browser, exporter

from kvcached.ledger import Ledger
from kvcached.units import format_size

expect.set_options(timeout=20_000)  # a busy machine's browser takes its time
TOKEN = "correct-horse-battery"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.fixture
def address(folder: Path, engines: dict[str, Engine], tmp_path: Path) -> Iterator[str]:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    arguments = ("--token-file", str(token), "--interval", "0.1")
    with exporter(folder, tmp_path / "log", *arguments) as url:
        yield url


@pytest.fixture
def page(chromium: Browser, address: str) -> Iterator[Page]:
    """The page, open; the test fails where the browser has anything to complain about."""
    complaints: list[str] = []
    opened = chromium.new_page(viewport={"width": 1280, "height": 900})
    opened.on("console", lambda said: complaints.append(said.text) if is_bad(said.type) else None)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.goto(address)
    yield opened
    opened.close()
    # A refused change is a line on the console: the one complaint that a test here asks for.
    assert [text for text in complaints if "401" not in text] == []


def is_bad(kind: str) -> bool:
    return kind in ("error", "warning")


def row(page: Page, name: str) -> str:
    return f'tr[data-instance="{name}"]'


def test_it_shows_what_the_ledger_says(page: Page, ledger: Ledger) -> None:
    expect(page.locator("h2").first).to_have_text(DEVICE)
    expect(page.locator("tbody tr")).to_have_count(2)
    now = ledger.snapshot()
    expect(page.locator(".sums")).to_contain_text(f"capacity {format_size(now.capacity)}")
    for account in now.accounts:
        cells = page.locator(row(page, account.name))
        for kind in ("charge", "in_use", "cached", "warm", "demand", "guarantee", "reclaimed"):
            size = format_size(getattr(account, kind))
            expect(cells.locator(f"td.{kind}")).to_have_text(size)
        expect(cells.locator(".limit .value")).to_have_text("none")
    layers = page.locator(".chart polygon.layer")
    expect(layers).to_have_count(2)
    expect(page.locator(".chart text", has_text="capacity")).to_have_count(1)


def bar_part(page: Page, name: str, state: str) -> float:
    part = page.locator(f"{row(page, name)} .bar rect.{state}")
    return float(part.get_attribute("width") or "nan")


def test_bars_are_to_scale(page: Page, ledger: Ledger) -> None:
    expect(page.locator("tbody tr")).to_have_count(2)
    ledger.set_guarantee("code", 4 * PAGE)
    ledger.set_limit("chat", 16 * PAGE)
    expect(page.locator(f"{row(page, 'code')} .bar rect.guarantee")).to_have_count(1)
    limit = page.locator(f"{row(page, 'chat')} .bar rect.limit")
    expect(limit).to_have_attribute("x", "500.00")
    late = ledger.join("late", "late")
    late.set_demand(8 * PAGE)
    expect(page.locator(f"{row(page, 'late')} .bar rect.demand")).to_have_attribute(
        "width", "248.00"
    )
    late.close()
    account = ledger.snapshot().account("chat")
    assert account is not None
    for state, size in (("in_use", account.in_use), ("cached", account.cached)):
        assert bar_part(page, "chat", state) == pytest.approx(1000 * size / (PAGES * PAGE), abs=1)


def test_it_follows_the_ledger(page: Page, ledger: Ledger, engines: dict[str, Engine]) -> None:
    charge = page.locator(f"{row(page, 'code')} td.charge")
    before = charge.inner_text()
    pool = engines["code"].one
    pool.alloc(3 * PER_PAGE)
    pool.carry()
    pool.pool.publish()
    expect(charge).not_to_have_text(before)
    expect(charge).to_have_text(format_size(pool.account.charge()))
    third = ledger.join("late", "<b>late</b>")
    expect(page.locator("tbody tr")).to_have_count(3)
    expect(page.locator(f"{row(page, 'late')} .name")).to_have_text("<b>late</b>")
    third.close()
    expect(page.locator("tbody tr")).to_have_count(2)
    expect(page.locator("#events li").first).to_contain_text("left")


def test_reclaim_is_a_mark(page: Page, ledger: Ledger) -> None:
    expect(page.locator("tbody tr")).to_have_count(2)
    ledger.ask_back("chat", 4 * PAGE)
    expect(page.locator('.chart path[data-event="reclaim"]')).to_have_count(1)
    expect(page.locator("#events li").first).to_contain_text("chat: reclaim")


def test_a_limit_is_changed_with_the_token_only(page: Page, ledger: Ledger) -> None:
    field = page.locator(f"{row(page, 'chat')} .limit input")
    shown = page.locator(f"{row(page, 'chat')} .limit .value")
    page.locator("#token").fill("wrong")
    field.fill("50%")
    with page.expect_response("**/api/v1/limit") as refused:
        field.press("Enter")
    assert refused.value.status == 401
    said = "field => field.validationMessage === 'this is not the token'"
    page.wait_for_function(said, arg=field.element_handle())
    expect(shown).to_have_text("none")
    page.locator("#token").fill(TOKEN)
    field.fill("50%")
    field.press("Enter")
    expect(shown).to_have_text(format_size(PAGES * PAGE // 2))
    account = ledger.snapshot().account("chat")
    assert account is not None and account.limit == PAGES * PAGE // 2
    field.fill("none")
    page.locator(f"{row(page, 'chat')} .limit button").click()
    expect(shown).to_have_text("none")


def test_light_and_dark(page: Page) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        style = "getComputedStyle(document.body).backgroundColor"
        colours[scheme] = [int(n) for n in re.findall(r"\d+", page.evaluate(style))[:3]]
    assert sum(colours["light"]) > 600 and sum(colours["dark"]) < 150


def test_it_says_when_the_exporter_is_gone(
    chromium: Browser, folder: Path, engines: dict[str, Engine], tmp_path: Path
) -> None:
    opened = chromium.new_page()
    with exporter(folder, tmp_path / "log", "--interval", "0.1") as url:
        opened.goto(url)
        expect(opened.locator("tbody tr")).to_have_count(2)
        expect(opened.locator("#token-form")).to_be_hidden()
        expect(opened.locator("tbody form").first).to_be_hidden()
    expect(opened.locator("#status")).to_contain_text("no answer")
    opened.close()


def test_sizes_are_written_as_by_the_other_tools(page: Page) -> None:
    sizes = [0, 1, 1023, 1024, 1536, 6553600, 5 << 30, -(3 << 20), *(n * 65536 for n in range(400))]
    shown = page.evaluate("sizes => sizes.map(sizeText)", sizes)
    assert shown == [format_size(size) for size in sizes]
