"""Engines that are killed and stopped at random under load: the others go on, nobody gets another
model's answer, nothing is left.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest
from service import alive
from test_serve_command import Served, serving, wait_until
from toys import mentioning

CALM, HIT = "a", "b"
HONEST = {502, 503}
SECONDS = 12.0


class Asking:
    """Threads that ask a model one request after the other."""

    def __init__(self, served: Served, name: str, threads: int) -> None:
        self.good = 0
        self.bad: list[str] = []
        self._served, self._name = served, name
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def _run(self) -> None:
        while not self._end.is_set():
            try:
                answer = self._served.ask(self._name, seconds=0.05)
            except httpx.HTTPError as error:
                self.bad.append(f"{type(error).__name__}: {error}")
                continue
            if answer.status_code == 200 and answer.json()["model"] == self._name:
                self.good += 1
            else:
                self.bad.append(f"{answer.status_code} {answer.text}")

    def __enter__(self) -> Asking:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.parametrize("seed", [0, 1])
def test_random_kills_and_stops(tmp_path: Path, toy_python: Path, seed: int) -> None:
    chance = random.Random(seed)
    with serving(tmp_path, toy_python) as served:
        wait_until(lambda: all(m["state"] == "ready" for m in served.status()["models"]), "ready")
        pids = set(served.pids())
        calm = served.model(CALM)
        with Asking(served, CALM, 4) as others, Asking(served, HIT, 4) as hit:
            end_s = time.monotonic() + SECONDS
            while time.monotonic() < end_s:
                time.sleep(chance.uniform(0.05, 1.2))
                if pid := served.model(HIT)["pid"]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, chance.choice([signal.SIGKILL, signal.SIGSTOP]))
                pids |= set(served.pids())
            wait_until(lambda: served.model(HIT)["state"] == "ready", "it runs again", 20)
            before = hit.good
            wait_until(lambda: hit.good > before + 20, "it answers again", 20)
        assert others.bad == [] and others.good > 100
        assert served.model(CALM)["pid"] == calm["pid"]
        assert served.model(HIT)["starts"] >= 3
        assert {text.partition(" ")[0] for text in hit.bad} <= {str(code) for code in HONEST}
        now = set(served.pids())
        wait_until(lambda: not any(alive(pid) for pid in pids - now), "the dead are gone", 5)
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(20) == 0
    assert not any(alive(pid) for pid in pids)
    assert not mentioning(str(tmp_path / CALM)) and not mentioning(str(tmp_path / HIT))
