"""`kvcached serve` as a process of its own, over toy engines."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from service import alive
from toys import mentioning

import kvcached
from kvcached.config import child_environment
from kvcached.processes import session_processes

SOURCE = Path(kvcached.__file__).parents[1]
ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    return child_environment({"PYTHONPATH": str(SOURCE)})


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "kvcached.cli.main", "serve", *arguments]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), env=environment(), capture_output=True, text=True, timeout=60
    )


def wait_until(condition: Callable[[], Any], what: str, limit_s: float = 15.0) -> None:
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s, f"not within {limit_s} s: {what}"
        time.sleep(0.02)


class Served:
    """A running service."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(self.url + "/status").json()
        return found

    def model(self, name: str) -> dict[str, Any]:
        (found,) = (each for each in self.status()["models"] if each["name"] == name)
        return dict(found)

    def ask(self, model: str, seconds: float = 0.0) -> httpx.Response:
        body = {"model": model, "prompt": "x", "seconds": seconds}
        return httpx.post(self.url + "/v1/completions", json=body, timeout=30)

    def pids(self) -> list[int]:
        """Of the guard and of all engines."""
        found = self.status()
        sessions = [each["pid"] for each in found["models"] if each["pid"]]
        return [found["guard_pid"], *(p for s in sessions for p in session_processes(s))]


@contextlib.contextmanager
def serving(folder: Path, python: Path, **more: Any) -> Iterator[Served]:
    models = [
        {
            "name": name,
            "aliases": [name + "-alias"],
            "python": str(python),
            "start": "at once",
            "environment": {"ENABLE_KVCACHED": "0", "TOY_RECORD": str(folder / name)},
            "health": {"every_s": 0.2, "timeout_s": 1},
            "restart": {"first_s": 0.1, "longest_s": 0.5, "give_up_after": 1000},
        }
        for name in ("a", "b")
    ]
    data = {"listen": "127.0.0.1:0", "memory": {"device": "host:toys"}, "models": models, **more}
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(data))
    with (folder / "stderr").open("w") as errors:
        process = subprocess.Popen(
            command(str(path), "--json"),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, (folder / "stderr").read_text()
    served = Served(process, json.loads(line)["url"])
    try:
        yield served
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def ready(served: Served) -> bool:
    return all(each["state"] == "ready" for each in served.status()["models"])


def test_one_address_for_all_and_a_clean_end(tmp_path: Path, toy_python: Path) -> None:
    with serving(tmp_path, toy_python, logs={"folder": str(tmp_path / "logs")}) as served:
        answers = {name: served.ask(name).json()["pid"] for name in ("a", "b", "a-alias")}
        assert answers["a"] == answers["a-alias"] == served.model("a")["pid"] != answers["b"]
        pids = served.pids()
        assert len(pids) == 5
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(15) == 0
        assert not any(alive(pid) for pid in pids)
    assert "a toy starts" in (tmp_path / "logs" / "a.log").read_text()
    assert "[b] a toy starts" in (tmp_path / "stderr").read_text()


def test_sigterm_lets_requests_end_and_takes_no_others(tmp_path: Path, toy_python: Path) -> None:
    with serving(tmp_path, toy_python) as served:
        wait_until(lambda: ready(served), "both ready")
        answers: list[httpx.Response] = []
        asker = threading.Thread(target=lambda: answers.append(served.ask("a", seconds=2)))
        asker.start()
        wait_until(lambda: served.model("a")["requests"] == 1, "the request is there")
        served.process.send_signal(signal.SIGTERM)
        wait_until(lambda: refuses(served), "no further connections", limit_s=1.5)
        asker.join()
        assert answers[0].status_code == 200
        assert served.process.wait(15) == 0


def refuses(served: Served) -> bool:
    try:
        httpx.get(served.url + "/health")
    except httpx.ConnectError:
        return True
    return False


def test_a_drain_has_an_end(tmp_path: Path, toy_python: Path) -> None:
    with serving(tmp_path, toy_python, drain_s=1) as served:
        wait_until(lambda: ready(served), "both ready")
        asker = threading.Thread(target=lambda: suppressed(served))
        asker.start()
        wait_until(lambda: served.model("a")["requests"] == 1, "the request is there")
        pids = served.pids()
        began_s = time.monotonic()
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(15) == 0
        assert time.monotonic() - began_s < 10
        assert not any(alive(pid) for pid in pids)
        asker.join()


def suppressed(served: Served) -> None:
    with contextlib.suppress(httpx.HTTPError):
        served.ask("a", seconds=25)


@pytest.mark.parametrize("state", ["starting", "ready"])
def test_a_killed_service_leaves_no_process(tmp_path: Path, toy_python: Path, state: str) -> None:
    more = {"environment": {"TOY_START_S": "20"}} if state == "starting" else {}
    with serving(tmp_path, toy_python, **more) as served:
        wait_until(lambda: served.model("b")["state"] == state and served.model("b")["pid"], state)
        wait_until(lambda: served.model("a")["state"] == state and served.model("a")["pid"], state)
        wait_until(lambda: len(served.pids()) == 5, "all processes")
        pids = served.pids()
        os.kill(served.process.pid, signal.SIGKILL)
        served.process.wait()
        wait_until(lambda: not any(alive(pid) for pid in pids), "all have ended", limit_s=5)


def test_a_service_killed_again_and_again_while_it_starts_leaves_no_process(
    tmp_path: Path, toy_python: Path
) -> None:
    """Also an engine that was forked an instant before, of which nobody had told the guard."""
    for number in range(12):
        folder = tmp_path / str(number)
        folder.mkdir()
        with serving(folder, toy_python) as served:
            time.sleep(0.01 * number)
            os.kill(served.process.pid, signal.SIGKILL)
            served.process.wait()
        wait_until(lambda path=str(folder / "a"): not mentioning(path), "all have ended", limit_s=5)


def test_the_guard_is_replaced_when_it_is_killed(tmp_path: Path, toy_python: Path) -> None:
    with serving(tmp_path, toy_python) as served:
        wait_until(lambda: ready(served), "both ready")
        guard = served.status()["guard_pid"]
        os.kill(guard, signal.SIGKILL)
        wait_until(lambda: served.status()["guard_pid"] != guard, "another guard")
        pids = served.pids()
        os.kill(served.process.pid, signal.SIGKILL)
        served.process.wait()
        wait_until(lambda: not any(alive(pid) for pid in pids), "all have ended", limit_s=5)


def test_a_killed_engine_leaves_the_other_alone(tmp_path: Path, toy_python: Path) -> None:
    with serving(tmp_path, toy_python) as served:
        wait_until(lambda: ready(served), "both ready")
        a, b = served.model("a")["pid"], served.model("b")["pid"]
        os.kill(a, signal.SIGKILL)
        wait_until(lambda: served.model("a")["pid"] not in (a, None), "a restart")
        assert served.ask("a").json()["pid"] == served.model("a")["pid"]
        assert served.ask("b").json()["pid"] == b


def test_a_port_that_is_taken_is_one_line(tmp_path: Path, toy_python: Path) -> None:
    with serving(tmp_path, toy_python) as served:
        port = served.url.rpartition(":")[2]
        path = tmp_path / "other.yaml"
        text = f"listen: 127.0.0.1:{port}\nmodels: [{{name: a, python: {toy_python}}}]\n"
        path.write_text(text + "memory: {device: 'host:x'}\n")
        ran = run(str(path))
        assert ran.returncode == 2
        assert ran.stderr.strip().endswith(f"listen: 127.0.0.1:{port}: Address already in use")


def test_check(tmp_path: Path, toy_python: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(
        f"models:\n- name: a\n  python: {toy_python}\n  sleep: {{after_s: 60}}\n"
        "memory: {device: 'host:x'}\n"
    )
    ran = run(str(path), "--check")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.splitlines()[1].split() == ["a", "vllm", "on", "demand", "stop"]
    found = json.loads(run(str(path), "--check", "--json").stdout)
    assert found["ok"] and found["problems"] == [] and found["models"][0]["sleeps"] == "stop"
    path.write_text("models:\n- name: a\n  limit: lots\n- name: b\n  python: /no/python\n")
    ran = run(str(path), "--check")
    assert ran.returncode == 2
    assert ran.stderr.startswith(f"{path}:3: models[0].limit: expected a size")
    found = json.loads(run(str(path), "--check", "--json").stdout)
    assert not found["ok"] and found["problems"][0]["field"] == "models[0].limit"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    ran = run(str(tmp_path / "no.yaml"), "--check")
    assert ran.returncode == 1 and ran.stderr.startswith("kvcached: ")
    assert len(ran.stderr.splitlines()) == 1
    ran = run("--check")
    assert ran.returncode == 2 and "name one" in ran.stderr


def test_schema_is_the_published_one() -> None:
    published = (ROOT / "docs" / "serve.schema.json").read_text()
    assert json.loads(run("--schema").stdout) == json.loads(published)
