"""Engine processes of the demo: ``vllm serve`` children in sessions of their own.

Each engine leads its own session, so its helper processes are found and ended together, and a
demo that is interrupted leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from kvcached.config import child_environment
from kvcached.demo.models import Model
from kvcached.errors import KvcachedError
from kvcached.ports import free_port
from kvcached.processes import session_processes

START_LIMIT_S = 240.0
STOP_LIMIT_S = 20.0
RESET_LIMIT_S = 5.0
SILENT_RESETS = 10  # a twentieth of a second apart

ENGINE_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # POST /reset_prefix_cache
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",  # two engines share two cores
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_LOGGING_COLOR": "0",
}


class EngineFailedError(KvcachedError):
    """An engine of the demo did not start or died; the message holds the end of its log."""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What to start: a model under a short name, engine arguments, environment, log file."""

    name: str
    model: Model
    arguments: Sequence[str]
    environment: Mapping[str, str]
    log: Path


class EngineProcess:
    """One running ``vllm serve``. Not thread safe; use from the thread that started it."""

    def __init__(self, spec: EngineSpec) -> None:
        """Starts the process and returns at once; ``wait_healthy`` waits for the server."""
        self.spec = spec
        self.name = spec.name
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.started_at = time.monotonic()
        spec.log.parent.mkdir(parents=True, exist_ok=True)
        command = [*vllm_command(), "serve", str(spec.model.path), "--port", str(self.port)]
        command += ["--host", "127.0.0.1", "--served-model-name", spec.model.name]
        with spec.log.open("wb") as log:
            self._process = subprocess.Popen(
                command + list(spec.arguments),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=child_environment({**ENGINE_ENVIRONMENT, **spec.environment}),
                start_new_session=True,
            )

    @property
    def session(self) -> int:
        """The session id shared by all processes of this engine."""
        return self._process.pid

    def alive(self) -> bool:
        return self._process.poll() is None

    def healthy(self) -> bool:
        """Whether /health answers now. Raises EngineFailedError when the process has ended."""
        if not self.alive():
            raise EngineFailedError(
                f"engine {self.name} ended with exit {self._process.returncode}; "
                f"its log {self.spec.log} ends with:\n{self.log_tail()}"
            )
        try:
            return httpx.get(self.url + "/health", timeout=2.0).status_code == 200
        except httpx.HTTPError:
            return False

    def metrics(self) -> dict[str, float]:
        """Sums of the engine's Prometheus samples by metric name (labels added together)."""
        sums: dict[str, float] = {}
        for line in httpx.get(self.url + "/metrics", timeout=10.0).text.splitlines():
            if line.startswith("vllm:"):
                name, _, value = line.rpartition(" ")
                name = name.partition("{")[0]
                sums[name] = sums.get(name, 0.0) + float(value)
        return sums

    def preemptions(self) -> int:
        return int(self.metrics().get("vllm:num_preemptions_total", 0.0))

    def reset_prefix_cache(self) -> None:
        """Drops every cached block; a refusal that lasts is an error: figures would be wrong.

        vLLM refuses while the last step's blocks are still held, a moment after the answer. Older
        versions do not say whether they did it: they are asked again after such a moment.
        """
        deadline = time.monotonic() + RESET_LIMIT_S
        silent = 0
        while True:
            answer = httpx.post(self.url + "/reset_prefix_cache", timeout=30.0).raise_for_status()
            silent += not answer.content
            if silent == SILENT_RESETS or (answer.content and answer.json()["success"]):
                return
            if time.monotonic() > deadline:
                raise EngineFailedError(f"engine {self.name} does not reset its prefix cache")
            time.sleep(0.05)

    def log_tail(self, lines: int = 15) -> str:
        text = self.spec.log.read_text(errors="replace").splitlines()
        return "\n".join(text[-lines:])

    def stop(self) -> None:
        """Ends the session: politely, then by force. Returns when no process of it is left."""
        if self.alive():
            self._process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_LIMIT_S)
        deadline = time.monotonic() + 3.0
        while session_processes(self.session) and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in session_processes(self.session):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()


def vllm_command() -> list[str]:
    """The ``vllm`` of this Python's environment; where its scripts are missing, its module."""
    program = Path(sys.executable).with_name("vllm")
    if program.exists():
        return [str(program)]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main"]


@contextlib.contextmanager
def running(
    specs: Sequence[EngineSpec], progress: Callable[[str], None]
) -> Iterator[list[EngineProcess]]:
    """Starts engines together, yields them healthy, ends them whatever happens."""
    engines: list[EngineProcess] = []
    with contextlib.ExitStack() as ends:  # an interrupt while one stops must not spare the others
        for spec in specs:
            engines.append(EngineProcess(spec))
            ends.callback(engines[-1].stop)
        wait_healthy(engines, progress)
        yield engines


def wait_healthy(engines: Sequence[EngineProcess], progress: Callable[[str], None]) -> None:
    """Waits until all answer /health, telling ``progress`` about each one that does."""
    waiting = list(engines)
    deadline = time.monotonic() + START_LIMIT_S
    while waiting:
        for engine in list(waiting):
            if engine.healthy():
                waiting.remove(engine)
                elapsed = time.monotonic() - engine.started_at
                progress(
                    f"engine {engine.name} ({engine.spec.model.name}) is up after {elapsed:.0f} s"
                )
        if waiting and time.monotonic() > deadline:
            late = waiting[0]
            raise EngineFailedError(
                f"engine {late.name} did not answer within {START_LIMIT_S:.0f} s; "
                f"its log {late.spec.log} ends with:\n{late.log_tail()}"
            )
        time.sleep(0.25)
