"""Real SGLang engines for tests: processes in sessions of their own, watched from outside."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import kvcached
from kvcached.config import child_environment
from kvcached.demo.sampler import SessionWatch
from kvcached.processes import session_processes

MIB = 1 << 20
HERE = Path(__file__).parent
SOURCE = Path(kvcached.__file__).parents[1]

PROMPTS = [[(i * 7 + j * 13) % 990 + 5 for j in range(40 + 30 * i)] for i in range(10)]
MAX_TOKENS = 48

ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "TRITON_INTERPRET": "1",  # for pages of several slots, before 0.5.23
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # A leak that SGLang finds ends its scheduler, in all versions; it looks in each step, too.
    "SGLANG_IS_IN_CI": "true",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
}


def switched_on(folder: Path, capacity: int, name: str = "one", **more: str) -> dict[str, str]:
    return {
        "ENABLE_KVCACHED": "true",
        "KVCACHED_DEVICE": f"host:test-{os.getpid()}",
        "KVCACHED_DIR": str(folder / "ledger"),
        "KVCACHED_CAPACITY": str(capacity),
        "KVCACHED_NAME": name,
        **more,
    }


def wait_until(condition: Callable[[], Any], limit_s: float, what: str) -> float:
    """Seconds until the condition holds; fails when it does not in time."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < limit_s, f"not within {limit_s} s: {what}"
        time.sleep(0.005)
    return time.monotonic() - start


class Engine:
    """One run of engine_process.py."""

    def __init__(
        self, folder: Path, job: Mapping[str, Any], changes: Mapping[str, str], *paths: Path
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.answer_file = folder / "answer.json"
        self.log = folder / "log"
        job_file = folder / "job.json"
        whole = {"long": True, "prompts": PROMPTS, "max_tokens": MAX_TOKENS, "rounds": 2, **job}
        job_file.write_text(json.dumps({**whole, "answer": str(self.answer_file)}))
        path = os.pathsep.join(str(each) for each in (*paths, SOURCE))
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "engine_process.py"), str(job_file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=child_environment({**ENVIRONMENT, "PYTHONPATH": path, **changes}),
                cwd=folder,
                start_new_session=True,
            )

    @property
    def session(self) -> int:
        return self.process.pid

    def answer(self, limit_s: float = 150.0, outputs: int = 0) -> Any:
        """The answer, as soon as it is there with so many outputs; the process may still run."""

        def there() -> bool:
            if self.answer_file.exists() and len(self._read()["outputs"]) >= outputs:
                return True
            ended = self.process.poll()
            assert ended is None, f"ended with {ended}:\n{self.log_tail()}"
            return False

        try:
            wait_until(there, limit_s, f"the answer of {self.folder.name}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log_tail()}") from None
        return self._read()

    def _read(self) -> Any:
        return json.loads(self.answer_file.read_text())

    def ended(self, limit_s: float = 90.0) -> int:
        """The exit status, once the process has ended by itself."""
        return self.process.wait(limit_s)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def log_tail(self) -> str:
        return "\n".join(self.text().splitlines()[-40:])

    def processes(self) -> list[int]:
        return session_processes(self.session)

    def kill(self) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class MemoryWatch:
    """Samples the memory of engines from outside, every few milliseconds, in a thread."""

    def __init__(self, *engines: Engine) -> None:
        self.peak = 0
        self.samples = 0
        self._watches = [SessionWatch(engine.session) for engine in engines]
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def total(self) -> int:
        return sum(watch.physical_bytes() for watch in self._watches)

    def _run(self) -> None:
        while not self._end.wait(0.004):
            total = self.total()
            if total > self.peak:
                # Two files are not read at one moment: bytes that went from one to the other in
                # between would count twice. What is really there is there the next time too.
                total = min(total, self.total(), self.total())
            self.peak = max(self.peak, total)
            self.samples += 1

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
