"""SGLang behind `kvcached serve`, from an environment of its own: stopped when idle, started for
the next request, replaced when it dies or hangs.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from sgl_harness import ENVIRONMENT, MAX_TOKENS, MIB, PROMPTS, SOURCE, VllmEngine, wait_until

from kvcached.ledger import Ledger
from kvcached.processes import session_processes
from kvcached.snapshot import AccountSnapshot

sys.path.append(str(Path(__file__).resolve().parents[1] / "serve"))
from served import Served

pytestmark = pytest.mark.engine
SLEEP_AFTER_S = 6.0
NAMES = ("rests", "stays")


class Service(Served):
    """A running `kvcached serve` with one model twice: `rests` is stopped when idle."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._place = (folder / "ledger", f"host:sgl-serve-{os.getpid()}")
        arguments = {"device": "cpu", "attention-backend": "torch_native", "dtype": "float32"}
        arguments |= {"sampling-backend": "pytorch", "disable-cuda-graph": True}
        arguments |= {"context-length": 4096, "mem-fraction-static": 0.1}
        common = {
            "engine": "sglang",
            "model": str(model),
            "python": sys.executable,
            "arguments": arguments,
            "health": {"every_s": 1.0, "timeout_s": 20.0},
            "restart": {"first_s": 0.5},
        }
        sleeps = {"rests": {"after_s": SLEEP_AFTER_S}, "stays": {"kv_after_s": None}}
        settings = {
            "listen": "127.0.0.1:0",
            "memory": {
                "device": self._place[1],
                "capacity": 16 * MIB,
                "directory": str(self._place[0]),
            },
            "environment": {
                **ENVIRONMENT,
                "PYTHONPATH": str(SOURCE),
                "KVCACHED_VIRTUAL": str(64 * MIB),
            },
            "logs": {"folder": str(folder / "logs")},
            "models": [{**common, "name": name, "sleep": sleeps[name]} for name in NAMES],
        }
        super().__init__(folder, {"PYTHONPATH": str(SOURCE)}, settings, VllmEngine.PYTHON)

    def account(self, name: str) -> AccountSnapshot | None:
        """Of the living: who asks for memory next clears the rows of others, as this does."""
        with Ledger.open(*self._place, create=False) as ledger:
            ledger.reap()
            return ledger.snapshot().account(name)

    def ask(self, name: str, index: int) -> list[int]:
        """The tokens of a prompt; the tests' model has words that say their numbers."""
        body = {
            "model": name,
            "prompt": PROMPTS[index],
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "skip_special_tokens": False,
        }
        answer = httpx.post(self.url + "/v1/completions", json=body, timeout=200)
        assert answer.status_code == 200, answer.text
        text: str = answer.json()["choices"][0]["text"]
        return [int(word.removeprefix("w")) for word in text.split()]


@pytest.fixture(scope="module")
def service(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Service(model, tmp_path_factory.mktemp("serve"))
    try:
        yield service
        sessions = [pid for name in NAMES if (pid := service.model(name)["pid"])]
    finally:
        code = service.end()
    assert code == 0, service.output()
    assert not [pid for session in sessions for pid in session_processes(session)]


def test_an_idle_engine_is_stopped_and_started_for_the_next_request(
    service: Service, reference: list[list[int]]
) -> None:
    assert service.ask("rests", 3) == reference[3]
    before = service.model("rests")["pid"]
    wait_until(lambda: service.model("rests")["state"] == "stopped", 60, "it is stopped")
    assert not session_processes(before)
    assert service.account("rests") is None
    assert service.ask("rests", 4) == reference[4]
    after = service.model("rests")
    assert after["pid"] != before and after["starts"] == 2


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["server", "scheduler"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_stopped_engine_is_replaced(
    service: Service, reference: list[list[int]], kind: str, number: signal.Signals
) -> None:
    assert service.ask("stays", 5) == reference[5]
    before, account = service.model("stays"), service.account("stays")
    assert account is not None and account.owner_pid is not None
    pids = {"server": before["pid"], "scheduler": account.owner_pid}
    os.kill(pids[kind], number)
    wait_until(lambda: service.model("stays")["pid"] != before["pid"], 60, "it was noticed")
    assert service.ask("stays", 6) == reference[6]
    assert service.model("stays")["starts"] == before["starts"] + 1
    assert not session_processes(before["pid"])
