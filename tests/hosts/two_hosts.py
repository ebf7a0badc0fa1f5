"""Two Ray nodes on one machine, each with an address, a ledger folder and a device of its own, and
`kvcached serve` over them. Ray is found in the environment, or in build/ray (`make test-ray`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

import kvcached
from kvcached.config import child_environment

sys.path.append(str(Path(__file__).resolve().parents[1] / "serve"))
import served
from toys import mentioning

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(kvcached.__file__).parents[1]
RAY = ROOT / "build" / "ray"
NAMES = ("north", "south")
ADDRESSES = {"north": "127.0.0.2", "south": "127.0.0.3"}
PORT = 26379


def has_ray() -> bool:
    return importlib.util.find_spec("ray") is not None or (RAY / "ray").is_dir()


def wait_until(condition: Callable[[], Any], what: str, limit_s: float) -> float:
    began_s = time.monotonic()
    while not condition():
        assert time.monotonic() - began_s < limit_s, f"not within {limit_s} s: {what}"
        time.sleep(0.02)
    return time.monotonic() - began_s


class Cluster:
    """A head that serves nothing, and two nodes that can be killed and started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._run = uuid.uuid4().hex[:12]
        path = os.pathsep.join([str(SOURCE), *([str(RAY)] if RAY.is_dir() else [])])
        self.environment = {
            "PYTHONPATH": path,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DISABLE_IMPORT_WARNING": "1",
        }
        # Ray's sockets have short paths only.
        self._temporary = Path("/tmp") / f"kvr-{self._run}"

    def token(self, name: str) -> str:
        return f"RAY_TEST_NODE={self._run}-{name}"

    def _ray(self, name: str, *arguments: str, **more: str) -> str:
        variable, _, value = self.token(name).partition("=")
        environment = child_environment({**self.environment, variable: value, **more})
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *arguments]
        command += [f"--node-name={name}", "--num-cpus=1", "--object-store-memory=80000000"]
        ran = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    def begin(self) -> None:
        """The head, at the address that Ray finds for this machine."""
        more = ["--include-dashboard=false", f"--temp-dir={self._temporary}"]
        said = self._ray("head", "--head", f"--port={PORT}", *more)
        found = re.search(rf"address='([^']+:{PORT})'", said)
        assert found is not None, said
        self.address = found[1]

    def start(self, name: str, capacity: str = "64MiB") -> None:
        self._ray(
            name,
            f"--address={self.address}",
            f"--node-ip-address={ADDRESSES[name]}",
            KVCACHED_DEVICE=f"host:{name}",
            KVCACHED_DIR=str(self.folder / name),
            KVCACHED_CAPACITY=capacity,
        )

    def kill(self, name: str) -> list[int]:
        """Everything on the node at once, as when its machine loses power."""
        pids = mentioning(self.token(name))
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return pids

    def end(self) -> None:
        for name in (*NAMES, "head"):
            wait_until(lambda name=name: not self.kill(name), f"{name} ends", 20)  # type: ignore[misc]
        subprocess.run(["rm", "-rf", str(self._temporary)], check=True)


class Served(served.Served):
    """`kvcached serve` over the nodes."""

    def places(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for each in self.status()["models"]:
            found.setdefault(each["name"], []).append(each["host"])
        return found

    def hosts(self) -> list[str]:
        return sorted(each["name"] for each in self.status()["hosts"])

    def ready(self, model: str) -> bool:
        return all(each["state"] == "ready" for each in self.engines(model))

    def ask(self, model: str, **more: Any) -> httpx.Response:
        body = {"model": model, "prompt": "x", **more}
        return httpx.post(self.url + "/v1/completions", json=body, timeout=120)


@contextlib.contextmanager
def cluster(folder: Path, capacity: str = "64MiB") -> Iterator[Cluster]:
    found = Cluster(folder)
    try:
        found.begin()
        for name in NAMES:
            found.start(name, capacity)
        yield found
    finally:
        found.end()
