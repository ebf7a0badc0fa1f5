"""Two hosts behind one address, one of them killed under load. Real Ray, toy engines."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from toys import mentioning
from two_hosts import ADDRESSES, NAMES, Cluster, Served, wait_until

ALONE = ("a", "b")
TWICE = "twice"
START_S = 1.0
LOST_AFTER_S = 5.0
QUICK_S, SLOW_S = 0.02, 4.0


def settings(cluster: Cluster, python: Path, folder: Path) -> dict[str, Any]:
    def model(name: str, **more: Any) -> dict[str, Any]:
        return {
            "name": name,
            "python": str(python),
            "start": "at once",
            "environment": {
                "ENABLE_KVCACHED": "0",
                "TOY_RECORD": str(folder / name),
                "TOY_START_S": str(START_S),
            },
            "load": {"weights": 1000, "token_bytes": 1000, "tokens_per_s": 100},
            "health": {"every_s": 0.2, "timeout_s": 1},
            "restart": {"first_s": 0.1},
            **more,
        }

    return {
        "listen": "127.0.0.1:0",
        "hosts": {"ray": cluster.address, "nodes": list(NAMES), "lost_after_s": LOST_AFTER_S},
        "models": [*(model(name) for name in ALONE), model(TWICE, replicas=2)],
    }


@pytest.fixture
def served(cluster: Cluster, toy_python: Path, tmp_path: Path) -> Iterator[Served]:
    found = Served(tmp_path, cluster.environment, settings(cluster, toy_python, tmp_path))
    try:
        for name in (*ALONE, TWICE):
            wait_until(lambda name=name: found.ready(name), f"{name} is ready", 40)  # type: ignore[misc]
        yield found
    finally:
        code = found.end()
        print(found.output())
    assert code in (0, -signal.SIGKILL)
    for name in NAMES:
        assert not [pid for pid in mentioning(cluster.token(name)) if b"vllm" in command(pid)]


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


class Load:
    """Requests for a model, one after the other, from a thread of its own."""

    def __init__(self, served: Served, model: str, seconds: float) -> None:
        self.answers: list[tuple[float, int, Any]] = []
        """When answered, with which status, and the engine's pid or the error's code."""
        self._ask = (served, model, seconds)
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        served, model, seconds = self._ask
        while not self._ends.is_set():
            answer = served.ask(model, seconds=seconds)
            found = answer.json()
            what = found["pid"] if answer.status_code == 200 else found["error"]["code"]
            self.answers.append((time.monotonic(), answer.status_code, what))

    def end(self) -> None:
        self._ends.set()
        self._thread.join()

    def first_of_another(self, pid: int) -> float | None:
        """When another engine than this one has answered first."""
        found = (end_s for end_s, status, who in self.answers if status == 200 and who != pid)
        return next(found, None)

    def errors(self) -> list[tuple[int, str]]:
        return [(status, code) for _, status, code in self.answers if status != 200]


def test_each_model_is_served_on_a_host_and_engines_ask_for_a_key(served: Served) -> None:
    places = served.places()
    assert sorted(places["a"] + places["b"]) == sorted(NAMES)
    assert sorted(places[TWICE]) == sorted(NAMES)
    for name in (*ALONE, TWICE):
        assert served.ask(name).status_code == 200
    (engine,) = served.engines("a")
    assert engine["url"].startswith(f"http://{ADDRESSES[engine['host']]}:")
    body = {"model": "a", "prompt": "x"}
    assert httpx.post(engine["url"] + "/v1/completions", json=body).status_code == 401
    assert httpx.get(engine["url"] + "/v1/models").status_code == 401


def test_replicas_share_requests(served: Served) -> None:
    before = {each["host"]: each["pid"] for each in served.engines(TWICE)}
    loads = [Load(served, TWICE, 0.5) for _ in range(4)]
    time.sleep(0.3)
    counts = [each["requests"] for each in served.engines(TWICE)]
    for load in loads:
        load.end()
    assert counts == [2, 2]
    assert {each["host"]: each["pid"] for each in served.engines(TWICE)} == before


@pytest.mark.parametrize("victim", NAMES)
def test_a_killed_hosts_models_come_back_on_the_other(
    served: Served, cluster: Cluster, victim: str
) -> None:
    other = next(name for name in NAMES if name != victim)
    places = served.places()
    (moves,) = (name for name in ALONE if places[name] == [victim])
    (stays,) = (name for name in ALONE if places[name] == [other])
    (lost,), (untouched,) = served.engines(moves), served.engines(stays)
    loads = {(name, s): Load(served, name, s) for name in places for s in (QUICK_S, SLOW_S)}
    time.sleep(1.0)  # the slow ones are in the middle of their first request
    killed_s = time.monotonic()
    assert cluster.kill(victim)
    wait_until(lambda: served.places()[moves] == [other], "it is placed anew", 20)
    placed_s = time.monotonic() - killed_s
    quick = loads[moves, QUICK_S]
    wait_until(lambda: quick.first_of_another(lost["pid"]), "it answers again", 30)
    assert served.hosts() == [other]
    for load in loads.values():
        load.end()
    back_s = (quick.first_of_another(lost["pid"]) or 0.0) - killed_s
    print(f"placed anew after {placed_s:.2f} s, the first answer after {back_s:.2f} s")
    assert 0 < back_s < START_S + LOST_AFTER_S + 2
    for (name, seconds), load in loads.items():
        print(name, seconds, len(load.answers), load.errors())
        # At most the one that was with the killed engine, and it says so.
        assert load.errors() in ([], [(502, "engine_failed")])
    assert not loads[stays, QUICK_S].errors() and not loads[stays, SLOW_S].errors()
    assert loads[moves, SLOW_S].errors()
    (after,) = served.engines(stays)
    assert (after["host"], after["pid"], after["starts"]) == (
        *(other, untouched["pid"], untouched["starts"]),
    )
    # The host comes back: the second replica goes there, what runs stays.
    cluster.start(victim)
    wait_until(lambda: served.hosts() == sorted(NAMES), "the host is back", 60)
    wait_until(lambda: served.ready(TWICE), "both replicas are ready", 30)
    assert sorted(served.places()[TWICE]) == sorted(NAMES)
    assert served.places()[moves] == served.places()[stays] == [other]


def test_a_killed_service_leaves_no_engine(served: Served, cluster: Cluster) -> None:
    assert served.ask("a").status_code == 200
    pids = [each["pid"] for name in (*ALONE, TWICE) for each in served.engines(name)]
    os.kill(served.process.pid, signal.SIGKILL)
    served.process.wait()
    wait_until(lambda: not any(b"vllm" in command(pid) for pid in pids), "engines end", 20)
