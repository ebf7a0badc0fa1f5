"""Programs that a test of the exporter needs: installed ones, or those of tools/operator_programs.

Also an exporter in a process of its own, and a browser.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from kvcached.config import child_environment

ROOT = Path(__file__).resolve().parents[2]
DEBIAN = ROOT / "build" / "debian"
DEVICE = "host:tools"
PAGES = 32
START_S = 60.0
HOW = "make programs brings it"


def program(name: str) -> Path:
    """The program, or the test is skipped."""
    for candidate in (shutil.which(name), DEBIAN / "usr" / "bin" / name):
        if candidate is not None and Path(candidate).exists():
            return Path(candidate)
    pytest.skip(f"{name} is not here: {HOW}")


@contextlib.contextmanager
def exporter(folder: Path, log: Path, *arguments: str) -> Iterator[str]:
    """Its address, while it runs on a free port."""
    command = [sys.executable, "-m", "kvcached.cli.main", "exporter", "--port", "0"]
    environment = {
        **child_environment({"KVCACHED_DIR": str(folder)}),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    with (
        log.open("w") as errors,
        subprocess.Popen([*command, *arguments], stderr=errors, env=environment) as process,
    ):
        try:
            yield _address(process, log)
        finally:
            process.terminate()
            assert process.wait(10) == 0, log.read_text()


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """Chromium without a window."""
    libraries = DEBIAN / "usr" / "lib" / "x86_64-linux-gnu"
    path = DEBIAN / "usr" / "lib" / "chromium" / "chromium"
    environment = {
        **child_environment({}),
        "LD_LIBRARY_PATH": f"{libraries}:{libraries / 'pulseaudio'}",
    }
    if installed := shutil.which("chromium"):
        path, environment = Path(installed), child_environment({})
    if not path.exists():
        pytest.skip(f"chromium is not here: {HOW}")
    with sync_playwright() as driver:
        # The sandbox needs rights that containers and root do not have; only our page is opened.
        found = driver.chromium.launch(executable_path=path, env=environment, args=["--no-sandbox"])
        try:
            yield found
        finally:
            found.close()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    end_s = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < end_s:
        time.sleep(0.02)
        if found := re.search(r"metrics on (http://\S+)/metrics", log.read_text()):
            return found.group(1)
    pytest.fail(log.read_text())
