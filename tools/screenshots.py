#!/usr/bin/env python3
"""Pictures of the dashboard and of kvtop, of whatever engines share a ledger folder right now.

    KVCACHED_DIR=... python tools/screenshots.py --seconds 60 --out docs/images

Needs playwright, and chromium (make programs). Writes dashboard-light.png, dashboard-dark.png and
kvtop.png.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests" / "operators"))

from programs import browser, exporter  # noqa: E402

from kvcached.config import Config  # noqa: E402

SIZE = {"width": 1280, "height": 860}


def dashboard(out: Path, seconds: float) -> None:
    """Lets the page follow the engines for a while, then photographs it in both schemes."""
    token = "not-a-secret-of-anybody"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "token").write_text(token)
        arguments = ("--token-file", f"{folder}/token", "--interval", "0.5")
        with (
            exporter(Config.from_env().directory, Path(folder) / "log", *arguments) as url,
            browser() as chromium,
        ):
            page = chromium.new_page(viewport=SIZE)
            page.goto(url)
            time.sleep(seconds)
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)
                page.screenshot(path=out / f"dashboard-{scheme}.png")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "screenshots")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long to watch first")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    dashboard(options.out, options.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
