"""`kvcached serve` over real engines: it starts them, puts them to sleep, survives what kills them,
and leaves nothing behind when it is killed itself.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from harness import MAX_TOKENS, MIB, PROMPTS, SOURCE, environment, wait_until

from kvcached.demo.servers import ENGINE_ENVIRONMENT
from kvcached.ledger import Ledger
from kvcached.processes import session_processes
from kvcached.snapshot import AccountSnapshot

sys.path.append(str(Path(__file__).resolve().parents[1] / "serve"))
from served import Served

KV_AFTER_S = 1.0
SLEEP_AFTER_S = 12.0


class Service(Served):
    """A running `kvcached serve` with three models: `awake` stays, `rests` gives its KV cache back,
    `ends` is stopped when it is idle.
    """

    def __init__(self, model: Path, folder: Path) -> None:
        self._place = (folder / "ledger", f"host:serve-{os.getpid()}")
        sleeps = {
            "awake": {"kv_after_s": None},
            "rests": {"kv_after_s": KV_AFTER_S, "after_s": 3, "how": "kv"},
            "ends": {"kv_after_s": None, "after_s": SLEEP_AFTER_S, "how": "stop"},
        }
        arguments = {"dtype": "float32", "enforce-eager": True, "block-size": 32}
        arguments |= {"max-model-len": 4096, "max-num-seqs": 64}
        data = {
            "listen": "127.0.0.1:0",
            "memory": {
                "device": self._place[1],
                "capacity": 24 * MIB,
                "directory": str(self._place[0]),
            },
            "parallel_starts": 1,
            "environment": {
                **ENGINE_ENVIRONMENT,
                "PYTHONPATH": str(SOURCE),
                "KVCACHED_VIRTUAL": str(64 * MIB),
            },
            "logs": {"folder": str(folder / "logs")},
            "models": [
                {
                    "name": name,
                    "model": str(model),
                    "arguments": arguments,
                    "sleep": sleep,
                    "start": "at once" if name == "awake" else "on demand",
                    "health": {"every_s": 1.0, "timeout_s": 20.0},
                    "restart": {"first_s": 0.5, "longest_s": 2.0, "give_up_after": 20},
                }
                for name, sleep in sleeps.items()
            ],
        }
        super().__init__(folder, environment({}), data)

    def state(self, name: str) -> str:
        return str(self.model(name)["state"])

    def account(self, name: str) -> AccountSnapshot:
        with Ledger.open(*self._place, create=False, read_only=True) as ledger:
            account = ledger.snapshot().account(name)
        assert account is not None
        return account

    def charges(self) -> dict[str, int]:
        with Ledger.open(*self._place, create=False) as ledger:
            ledger.reap()
            return {a.name: a.charge for a in ledger.snapshot().accounts}

    def ask(self, name: str, index: int = 3) -> list[int]:
        """The tokens of a prompt; raises for what is no good answer."""
        body = {
            "model": name,
            "prompt": PROMPTS[index],
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        answer = httpx.post(self.url + "/v1/completions", json=body, timeout=200)
        assert answer.status_code == 200, answer.text
        tokens: list[int] = answer.json()["choices"][0]["token_ids"]
        return tokens

    def pids(self) -> list[int]:
        found = self.status()
        sessions = [each["pid"] for each in found["models"] if each["pid"]]
        return [found["guard_pid"], *(p for s in sessions for p in session_processes(s))]


@pytest.fixture(scope="module")
def service(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Service(model, tmp_path_factory.mktemp("serve"))
    try:
        yield service
    finally:
        service.end()


def test_three_models_behind_one_address(service: Service, plain: list[list[int]]) -> None:
    for name in ("awake", "rests"):
        assert service.ask(name, 5) == plain[5]
    assert service.state("ends") == "stopped"


def test_an_idle_model_gives_its_kv_cache_back_at_once(
    service: Service, plain: list[list[int]]
) -> None:
    assert service.ask("rests", 7) == plain[7]
    pinned = service.account("rests").page_bytes
    wait_until(lambda: service.account("rests").cached == 0, 10, "no cached block is left")
    wait_until(lambda: service.account("rests").charge <= 2 * pinned, 5, "and few pages")
    wait_until(lambda: service.state("rests") == "asleep", 20, "it rests", every_s=0.1)
    pid = service.model("rests")["pid"]
    assert service.ask("rests", 7) == plain[7]
    assert service.model("rests")["pid"] == pid


def test_a_stopped_model_answers_requests_that_came_at_any_time(
    service: Service, plain: list[list[int]]
) -> None:
    """One request in each state that it goes through, and another one at the end."""
    answers: dict[str, list[int]] = {}
    threads: list[threading.Thread] = []

    def ask(state: str, index: int) -> None:
        answers[state] = service.ask("ends", index)

    end_s = time.monotonic() + 200
    assert service.ask("ends", 1) == plain[1]
    while len(threads) < 3 or any(thread.is_alive() for thread in threads):
        assert time.monotonic() < end_s, threads
        state = service.state("ends")
        if state in ("falling asleep", "stopped", "starting") and state not in answers:
            answers[state] = []
            index = 2 + len(threads)
            thread = threading.Thread(target=ask, args=(state, index), name=state)
            threads.append(thread)
            thread.start()
        time.sleep(0.005)
    for index, state in enumerate(thread.name for thread in threads):
        assert answers[state] == plain[2 + index], state
    assert {thread.name for thread in threads} >= {"falling asleep", "starting"}


def ends() -> list[Any]:
    """Every kind of process, killed and stopped. ``make test`` has three of the six: each kind of
    process and each signal.
    """
    sample = {("api", signal.SIGKILL), ("core", signal.SIGSTOP), ("worker", signal.SIGKILL)}
    return [
        pytest.param(*end, marks=() if end in sample else pytest.mark.slow)
        for end in itertools.product(("api", "core", "worker"), (signal.SIGKILL, signal.SIGSTOP))
    ]


@pytest.mark.parametrize(("kind", "number"), ends())
def test_a_killed_or_stopped_engine_is_replaced_and_the_other_goes_on(
    service: Service, plain: list[list[int]], kind: str, number: signal.Signals
) -> None:
    assert service.ask("rests", 2) == plain[2]
    assert service.ask("awake", 2) == plain[2]
    other, before = service.model("rests")["pid"], service.model("awake")
    account = service.account("awake")
    pids = {"api": before["pid"], "core": account.owner_pid, "worker": account.members[0].pid}
    os.kill(pids[kind], number)
    wait_until(lambda: service.model("awake")["pid"] != before["pid"], 30, "it was noticed", 0.05)
    assert service.ask("rests", 2) == plain[2]
    assert service.ask("awake", 2) == plain[2]
    assert service.model("awake")["starts"] == before["starts"] + 1
    assert service.model("rests")["pid"] == other
    assert set(service.charges()) <= {"awake", "rests", "ends"}


def test_a_killed_service_leaves_no_process_and_no_bytes(
    service: Service, plain: list[list[int]]
) -> None:
    """The last one here: the service is gone afterwards."""
    for name in ("awake", "rests"):
        assert service.ask(name, 4) == plain[4]
    pids = service.pids()
    assert len(pids) >= 7
    os.kill(service.process.pid, signal.SIGKILL)
    service.process.wait()
    took_s = wait_until(
        lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids), 10, "all have ended"
    )
    print(f"all {len(pids)} processes had ended after {took_s:.2f} s")
    assert service.charges() == {}
