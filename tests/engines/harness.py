"""Real engines for tests: processes in sessions of their own, watched from outside."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from memory_watch import MemoryWatch

import kvcached
from kvcached.config import child_environment
from kvcached.demo.models import Model
from kvcached.demo.servers import ENGINE_ENVIRONMENT, EngineProcess, EngineSpec
from kvcached.ledger import Ledger
from kvcached.processes import session_processes
from kvcached.snapshot import AccountSnapshot

MIB = 1 << 20
HERE = Path(__file__).parent
SOURCE = Path(kvcached.__file__).parents[1]

PROMPTS = [[(i * 7 + j * 13) % 990 + 5 for j in range(40 + 30 * i)] for i in range(16)]
MAX_TOKENS = 80
TWO_LONGEST_BYTES = 5 * MIB
"""What two of the longest of these prompts need with their answers, as ``Pair`` sets engines up."""


def environment(changes: Mapping[str, str], *paths: Path) -> dict[str, str]:
    """For a child: this very kvcached, ``paths`` before it, vLLM set up for a small machine."""
    path = os.pathsep.join(str(p) for p in (*paths, SOURCE))
    return child_environment({**ENGINE_ENVIRONMENT, "PYTHONPATH": path, **changes})


def switched_on(folder: Path, capacity: int, **more: str) -> dict[str, str]:
    return {
        "ENABLE_KVCACHED": "true",
        "KVCACHED_DEVICE": f"host:test-{os.getpid()}",
        "KVCACHED_DIR": str(folder / "ledger"),
        "KVCACHED_CAPACITY": str(capacity),
        **more,
    }


def wait_until(
    condition: Callable[[], Any], limit_s: float, what: str, every_s: float = 0.005
) -> float:
    """Seconds until the condition holds; fails when it does not in time."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < limit_s, f"not within {limit_s} s: {what}"
        time.sleep(every_s)
    return time.monotonic() - start


def end_session(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to every process of the session that ``process`` leads."""
    for pid in session_processes(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


class LlmProcess:
    """One run of llm_process.py."""

    def __init__(
        self, folder: Path, job: Mapping[str, Any], changes: Mapping[str, str], *paths: Path
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.answer_file = folder / "answer.json"
        self.log = folder / "log"
        job_file = folder / "job.json"
        job_file.write_text(json.dumps({**job, "answer": str(self.answer_file)}))
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "llm_process.py"), str(job_file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(changes, *paths),
                cwd=folder,
                start_new_session=True,
            )

    def answer(self, limit_s: float) -> Any:
        """The answer, as soon as it is there; the process may still run."""

        def there() -> bool:
            if self.answer_file.exists():
                return True
            ended = self.process.poll()
            assert ended is None, f"ended with {ended}:\n{self.log_tail()}"
            return False

        wait_until(there, limit_s, "the answer of llm_process.py")
        return json.loads(self.answer_file.read_text())

    def log_tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])

    def __enter__(self) -> LlmProcess:
        return self

    def __exit__(self, *_: object) -> None:
        end_session(self.process)


def p99(values: Sequence[float]) -> float:
    """The 99th percentile; NaN of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] if ordered else math.nan


@dataclass(slots=True)
class Answer:
    """What a server said to one request."""

    status: int = 0
    tokens: list[int] = field(default_factory=list)
    ttft_s: float | None = None
    error: str = ""
    sent_s: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.error


class Server:
    """``vllm serve`` with the tiny model, restarted when a test has killed it."""

    def __init__(
        self, name: str, model: Path, folder: Path, changes: Mapping[str, str], *more: str
    ) -> None:
        self.name = name
        self._model = Model(name, model, 4, 2, 64, 1000)
        self._folder = folder
        self._changes = {**changes, "KVCACHED_NAME": name, "PYTHONPATH": str(SOURCE)}
        self._more = more
        self._starts = 0
        self.engine: EngineProcess | None = None

    def start(self) -> None:
        """Starts unless it runs; returns at once."""
        if self.engine is not None and self.engine.alive():
            return
        self.stop()
        self._starts += 1
        arguments = ["--dtype", "float32", "--enforce-eager", "--block-size", "32"]
        arguments += ["--max-model-len", "4096", "--max-num-seqs", "64", *self._more]
        log = self._folder / f"{self.name}-{self._starts}.log"
        spec = EngineSpec(self.name, self._model, tuple(arguments), self._changes, log)
        self.engine = EngineProcess(spec)

    @property
    def session(self) -> int:
        assert self.engine is not None
        return self.engine.session

    @property
    def url(self) -> str:
        assert self.engine is not None
        return self.engine.url

    def wait(self, limit_s: float = 240.0) -> None:
        assert self.engine is not None
        wait_until(self.engine.healthy, limit_s, f"{self.name} healthy", every_s=0.1)

    def stop(self) -> None:
        if self.engine is not None:
            self.engine.stop()
            self.engine = None

    def kill(self) -> None:
        if self.engine is not None:
            for pid in session_processes(self.session):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            gone = f"{self.name} has ended"  # its memory and its row may still be there until then
            wait_until(lambda: not session_processes(self.session), 20, gone)
            self.stop()

    def log(self) -> str:
        assert self.engine is not None
        return self.engine.spec.log.read_text(errors="replace")

    def metric(self, name: str) -> float:
        assert self.engine is not None
        return self.engine.metrics().get(name, 0.0)

    def ask(self, prompt: Sequence[int], max_tokens: int, answer: Answer | None = None) -> Answer:
        """One streamed completion; never raises for what the server does. It comes token by token
        into ``answer``, which is returned.
        """
        body = {
            "model": self.name,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        answer = answer or Answer()
        answer.sent_s = time.monotonic()
        try:
            with httpx.stream(
                "POST", self.url + "/v1/completions", json=body, timeout=120.0
            ) as response:
                answer.status = response.status_code
                if response.status_code != 200:
                    answer.error = response.read().decode(errors="replace")
                    return answer
                for line in response.iter_lines():
                    _take(answer, line)
        except httpx.HTTPError as error:
            answer.error = f"{type(error).__name__}: {error}"
        if not answer.error and len(answer.tokens) != max_tokens:
            answer.error = f"{len(answer.tokens)} tokens of {max_tokens}"
        return answer


def _take(answer: Answer, line: str) -> None:
    if not line.startswith("data: ") or line == "data: [DONE]":
        return
    event = json.loads(line[6:])
    if "error" in event:
        answer.error = json.dumps(event["error"])
        return
    for choice in event["choices"]:
        if tokens := choice.get("token_ids"):
            if answer.ttft_s is None:
                answer.ttft_s = time.monotonic() - answer.sent_s
            answer.tokens += tokens
        if choice.get("finish_reason") == "error":
            answer.error = "finish_reason error"


class Load:
    """Threads that keep asking a server the prompts, until the block ends."""

    def __init__(self, server: Server, threads: int, max_tokens: int = MAX_TOKENS) -> None:
        self.answers: list[tuple[int, Answer]] = []
        self._server = server
        self._max_tokens = max_tokens
        self._end = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(n, threads), daemon=True)
            for n in range(threads)
        ]

    def _run(self, first: int, step: int) -> None:
        number = first
        while not self._end.is_set():
            index = number % len(PROMPTS)
            answer = self._server.ask(PROMPTS[index], self._max_tokens)
            self.answers.append((index, answer))
            if not answer.ok:
                self._end.wait(0.05)
            number += step

    def ttft_s(self) -> list[float]:
        return sorted(a.ttft_s for _, a in self.answers if a.ttft_s is not None)

    def failures(self) -> list[str]:
        return [a.error for _, a in self.answers if not a.ok]

    def wrong(self, expected: Sequence[Sequence[int]]) -> list[int]:
        """The prompts whose answers are not what plain vLLM says."""
        return [
            index
            for index, a in self.answers
            if a.ok and a.tokens != list(expected[index][: self._max_tokens])
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()


class Pair:
    """Two servers under one budget, and the ledger between them."""

    def __init__(self, model: Path, folder: Path, capacity: int, **more: str) -> None:
        self.capacity = capacity
        # vLLM wants room for its longest request at start; what really fits is the ledger's affair.
        changes = switched_on(folder, capacity, KVCACHED_VIRTUAL=str(64 * MIB), **more)
        self.place = (folder / "ledger", changes["KVCACHED_DEVICE"])
        self.a, self.b = (Server(name, model, folder, changes) for name in ("a", "b"))
        self._ledger: Ledger | None = None

    def up(self) -> Pair:
        """Both run and answer."""
        for server in (self.a, self.b):
            server.start()
        for server in (self.a, self.b):
            server.wait()
        return self

    @property
    def ledger_directory(self) -> Path:
        return self.place[0]

    @property
    def ledger(self) -> Ledger:
        if self._ledger is None:
            self._ledger = Ledger.open(*self.place, create=False)
        return self._ledger

    def account(self, server: Server) -> AccountSnapshot:
        account = self.ledger.snapshot().account(server.name)
        assert account is not None, f"{server.name} has no account"
        return account

    def pids(self, server: Server) -> dict[str, int]:
        """By kind of process."""
        account = self.account(server)
        (member,) = account.members
        assert account.owner_pid is not None
        return {"api": server.session, "core": account.owner_pid, "worker": member.pid}

    @contextlib.contextmanager
    def guaranteed(self, server: Server, size_bytes: int) -> Iterator[None]:
        """The server is sure of so much: from the start of the block on, the other one leaves it.

        Nothing comes back from an engine that is stopped. Whoever is to go on beside it must have
        its memory by then.
        """
        (other,) = (s for s in (self.a, self.b) if s is not server)
        self.ledger.set_guarantee(server.name, size_bytes)
        try:
            most = self.capacity - size_bytes
            wait_until(lambda: self.account(other).charge <= most, 20, f"{other.name} gives back")
            yield
        finally:
            self.ledger.set_guarantee(server.name, 0)

    def watch(self) -> MemoryWatch:
        servers = [s for s in (self.a, self.b) if s.engine is not None]
        return MemoryWatch(lambda: [s.session for s in servers if s.engine is not None])

    def close(self) -> None:
        if self._ledger is not None:
            self._ledger.close()
        for server in (self.a, self.b):
            server.kill()


@contextlib.contextmanager
def limited(limit_s: float) -> Iterator[None]:
    """Fails the test, with the main thread's stack, when it takes longer."""

    def late(*_: object) -> None:
        raise TimeoutError(f"the test did not end within {limit_s} s")

    old = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
