"""Real SGLang engines for tests: processes in sessions of their own, watched from outside."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from memory_watch import MemoryWatch

import kvcached
from kvcached.config import child_environment
from kvcached.demo.servers import ENGINE_ENVIRONMENT
from kvcached.ledger import Ledger
from kvcached.processes import session_processes
from kvcached.snapshot import AccountSnapshot

MIB = 1 << 20
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
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

    PYTHON = Path(sys.executable)
    PROGRAM = HERE / "engine_process.py"
    ENVIRONMENT: Mapping[str, str] = ENVIRONMENT

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
                [str(self.PYTHON), str(self.PROGRAM), str(job_file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=child_environment({**self.ENVIRONMENT, "PYTHONPATH": path, **changes}),
                cwd=folder,
                start_new_session=True,
            )

    @property
    def session(self) -> int:
        return self.process.pid

    def answer(self, limit_s: float = 300.0, outputs: int = 0) -> Any:
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

    def ended(self, limit_s: float = 200.0) -> int:
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


class VllmEngine(Engine):
    """One run of vllm_process.py, with the vLLM of this checkout's .venv/."""

    PYTHON = ROOT / ".venv" / "bin" / "python"
    PROGRAM = HERE / "vllm_process.py"
    ENVIRONMENT = ENGINE_ENVIRONMENT


class Sharing:
    """Engines that wait for bursts (task ``bursts``) under one budget, the ledger between them, and
    the memory behind all of them.

    ``starts`` says how each is started, by its name. An engine that has died may be started again.
    """

    def __init__(self, folder: Path, starts: Mapping[str, Callable[[], Engine]]) -> None:
        self._starts = starts
        self._bursts = dict.fromkeys(starts, 0)
        self.engines = {name: start() for name, start in starts.items()}
        self.memory = MemoryWatch(lambda: [each.session for each in self.engines.values()])
        try:
            for engine in self.engines.values():
                engine.answer()
        except AssertionError:
            self._end()
            raise
        place = (folder / "ledger", f"host:test-{os.getpid()}")
        self.ledger = Ledger.open(*place, create=False, read_only=True)

    def account(self, name: str) -> AccountSnapshot | None:
        return self.ledger.snapshot().account(name)

    def charge(self, name: str) -> int:
        account = self.account(name)
        return 0 if account is None else account.charge

    def wait_for_work(self, name: str) -> None:
        """Until requests of this engine hold a good part of its memory."""

        def works() -> bool:
            account = self.account(name)
            return account is not None and account.in_use > MIB

        wait_until(works, 30, f"{name} works")

    def start_burst(self, name: str) -> None:
        (self.engines[name].folder / f"burst-{self._bursts[name]}").touch()
        self._bursts[name] += 1

    def outputs(self, name: str) -> list[list[int]]:
        """Of the burst that was started last."""
        answer = self.engines[name].answer(outputs=self._bursts[name])
        outputs: list[list[int]] = answer["outputs"][-1]
        return outputs

    def burst(self, name: str) -> list[list[int]]:
        self.start_burst(name)
        return self.outputs(name)

    def kill(self, name: str) -> float:
        """SIGKILL to the process that its user started; seconds until no other of it is left."""
        engine = self.engines[name]
        processes = engine.processes()
        os.kill(engine.process.pid, signal.SIGKILL)
        engine.process.wait()
        ended = f"{processes} end with their parent"
        return wait_until(lambda: not engine.processes(), 5, ended)

    def start_again(self, name: str) -> None:
        """Returns at once; the next burst waits until it is there."""
        self.engines[name] = self._starts[name]()
        self._bursts[name] = 0

    def __enter__(self) -> Sharing:
        self.memory.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.memory.__exit__(*error)
        self.ledger.close()
        self._end()

    def _end(self) -> None:
        for engine in self.engines.values():
            engine.kill()
