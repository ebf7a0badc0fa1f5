"""The exporter beside a router: its page shows models, their states and queues."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import expect
from programs import browser, exporter

sys.path.append(str(Path(__file__).resolve().parents[1] / "router"))
from router_runs import Running, ToyEngine, running, wait_until

KEY = "k-operator"


@pytest.fixture
def router() -> Iterator[Running]:
    toys = [ToyEngine(), ToyEngine()]
    queue = {"max_running": 1}
    models = [{"name": "a", "queue": queue}, {"name": "b"}]
    try:
        with running(toys, models=models, api_keys=[{"key": KEY}]) as started:
            yield started
    finally:
        for toy in toys:
            toy.kill()


def ask(router: Running) -> None:
    body = {"model": "a", "stream": True, "words": 30, "gap_s": 0.1}
    headers = {"Authorization": f"Bearer {KEY}"}
    httpx.post(router.url + "/v1/completions", json=body, headers=headers, timeout=30)


def test_models_and_queues_are_shown(router: Running, folder: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text(KEY + "\n")
    arguments = ("--serve", router.url, "--serve-key-file", str(key), "--interval", "0.1")
    with exporter(folder, tmp_path / "log", *arguments) as url:

        def serve() -> dict[str, object]:
            said: dict[str, object] = httpx.get(url + "/api/v1/state").json()["serve"]
            return said

        wait_until(lambda: serve()["models"], 10, "models are there")
        with browser() as chromium, ThreadPoolExecutor(3) as clients:
            for _ in range(3):
                clients.submit(ask, router)
            page = chromium.new_page()
            complaints: list[str] = []
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.goto(url)
            row = page.locator('#served tr[data-model="a"]')
            expect(row.locator(".state")).to_have_text("ready")
            expect(row.locator(".running")).to_have_text("1")
            expect(row.locator(".waiting")).to_have_text("2", timeout=20_000)
            expect(page.locator('#served tr[data-model="b"] .waiting')).to_have_text("0")
            clients.shutdown(wait=True)
            expect(row.locator(".admitted")).to_have_text("3", timeout=20_000)
            assert complaints == []


def test_a_router_that_is_not_there_is_said(folder: Path, tmp_path: Path) -> None:
    with exporter(folder, tmp_path / "log", "--serve", "http://127.0.0.1:1") as url:
        wait_until(
            lambda: "refused" in httpx.get(url + "/api/v1/state").json()["serve"]["problem"],
            *(10, "it says so"),
        )
    with exporter(folder, tmp_path / "log2") as url:
        assert httpx.get(url + "/api/v1/state").json()["serve"] is None
