#!/usr/bin/env python3
"""Pictures of the dashboard and of kvtop beside two vLLM engines that work under one budget.

    python tools/screenshots.py --out docs/images

Starts the engines of the tests (a tiny model on the CPU) and gives them load in turns; with
``--dir`` it photographs the engines that share that ledger folder instead. Needs playwright,
textual and chromium (make programs). Writes dashboard-light.png, dashboard-dark.png and kvtop.png.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / folder) for folder in ("operators", "engines", "support")]

from harness import MIB, Load, Pair, environment  # noqa: E402
from playwright.sync_api import Browser  # noqa: E402
from programs import browser, exporter  # noqa: E402

from kvcached.cli.top.app import KvTop  # noqa: E402
from kvcached.observe import Observer  # noqa: E402

SIZE = {"width": 1280, "height": 760}
CAPACITY = 24 * MIB
TURN_S = 9.0


@contextlib.contextmanager
def engines(folder: Path) -> Iterator[Path]:
    """The ledgers' folder, while two engines answer in turns; one has a limit, one a guarantee."""
    model = folder / "model"
    command = [sys.executable, str(ROOT / "tests" / "engines" / "tiny_model.py"), str(model)]
    subprocess.run(command, env=environment({}), check=True, capture_output=True)
    pair = Pair(model, folder, CAPACITY)
    over = threading.Event()

    def work() -> None:
        for turn in range(1000):
            server, threads = ((pair.a, 8), (pair.b, 6))[turn % 2]
            with Load(server, threads):
                if over.wait(TURN_S):
                    return

    worker = threading.Thread(target=work)
    try:
        pair.up()
        pair.ledger.set_limit("a", CAPACITY * 3 // 4)
        pair.ledger.set_guarantee("b", CAPACITY // 8)
        worker.start()
        yield folder / "ledger"
    finally:
        over.set()
        if worker.ident is not None:
            worker.join()
        pair.close()


def dashboard(chromium: Browser, url: str, out: Path, seconds: float) -> None:
    """Lets the page follow the engines for a while, then photographs it in both schemes."""
    page = chromium.new_page(viewport=SIZE)
    page.goto(url)
    time.sleep(seconds)
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.screenshot(path=out / f"dashboard-{scheme}.png")
    page.close()


def screen_of_kvtop(folder: Path, seconds: float) -> str:
    """The screen after a while, as SVG: textual's own picture of it."""

    async def look() -> str:
        with Observer(folder) as observer:
            app = KvTop(observer, 0.5, lambda *_: "")
            async with app.run_test(size=(80, 24)) as pilot:
                await pilot.pause(seconds)
                return app.export_screenshot()

    return asyncio.run(look())


def picture_of(chromium: Browser, svg: str, target: Path) -> None:
    page = chromium.new_page()
    page.set_content(f"<body style='margin:0;width:1000px'>{svg}</body>")
    page.locator("svg").first.screenshot(path=target)
    page.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "screenshots")
    parser.add_argument("--dir", type=Path, help="photograph the engines that share this folder")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to watch first")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = options.dir or stack.enter_context(engines(temporary))
        (temporary / "token").write_text("nobody's real token")
        arguments = ("--token-file", str(temporary / "token"), "--interval", "0.5")
        url = stack.enter_context(exporter(folder, temporary / "log", *arguments))
        with browser() as chromium:
            dashboard(chromium, url, options.out, options.seconds)
        # textual and playwright each want the thread's event loop for themselves.
        svg = screen_of_kvtop(folder, min(10.0, options.seconds))
        with browser() as chromium:
            picture_of(chromium, svg, options.out / "kvtop.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
