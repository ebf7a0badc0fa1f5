"""An unmodified SGLang server: what its clients see, and that its processes end together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sgl_harness import (
    ENVIRONMENT,
    MAX_TOKENS,
    MIB,
    PROMPTS,
    SOURCE,
    switched_on,
    wait_until,
)

from kvcached.config import child_environment
from kvcached.ledger import Ledger
from kvcached.ports import free_port
from kvcached.processes import session_processes

pytestmark = pytest.mark.engine
CAPACITY = 4 * MIB


class Server:
    """``python -m sglang.launch_server`` in a session of its own."""

    def __init__(self, model: Path, folder: Path) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "log"
        changes = switched_on(folder, CAPACITY, KVCACHED_VIRTUAL=str(64 * MIB))
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)]
        command += ["--device", "cpu", "--attention-backend", "torch_native", "--dtype", "float32"]
        command += ["--sampling-backend", "pytorch", "--disable-cuda-graph", "--port", str(port)]
        command += ["--skip-tokenizer-init", "--context-length", "4096"]
        command += ["--mem-fraction-static", "0.1"]  # 0.4 computes it from the GPU's memory
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=child_environment({**ENVIRONMENT, "PYTHONPATH": str(SOURCE), **changes}),
                cwd=folder,
                start_new_session=True,
            )
        self.place = (folder / "ledger", changes["KVCACHED_DEVICE"])

    def healthy(self) -> bool:
        assert self.process.poll() is None, self.log.read_text(errors="replace")[-4000:]
        try:
            return httpx.get(self.url + "/health", timeout=5.0).status_code == 200
        except httpx.HTTPError:
            return False

    def generate(self, prompt: list[int], max_tokens: int) -> Any:
        sampling = {"temperature": 0, "max_new_tokens": max_tokens, "ignore_eos": True}
        body = {"input_ids": prompt, "sampling_params": sampling}
        return httpx.post(self.url + "/generate", json=body, timeout=60.0)

    def processes(self) -> list[int]:
        return session_processes(self.process.pid)

    def kill(self) -> None:
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def server(model: Path, tmp_path: Path) -> Iterator[Server]:
    started = Server(model, tmp_path)
    try:
        wait_until(started.healthy, 300, "the server answers")
        yield started
    finally:
        started.kill()


@pytest.mark.parametrize(
    "victim",
    [
        "scheduler",
        pytest.param("detokenizer", marks=pytest.mark.matrix),
        pytest.param("server", marks=pytest.mark.matrix),
    ],
)
def test_the_death_of_one_process_is_that_of_all(
    server: Server, reference: list[list[int]], victim: str
) -> None:
    if victim == "scheduler":  # once is enough
        answers_and_refuses(server, reference)
    with Ledger.open(*server.place, create=False, read_only=True) as ledger:
        (account,) = ledger.snapshot().accounts
        assert account.name == "one" and account.ready and account.owner_pid is not None
        pids = {"scheduler": account.owner_pid, "server": server.process.pid}
        title = "detokenizer"
        others = [pid for pid in server.processes() if pid not in pids.values()]
        named = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().decode() for pid in others}
        pids[title] = next(pid for pid, name in named.items() if title in name)
        os.kill(pids[victim], signal.SIGKILL)
        if victim == "server":
            server.process.wait()
        gone = wait_until(
            lambda: not {*pids.values()} & {*server.processes()}, 5, "all of them end"
        )
        assert gone < 1.5


def answers_and_refuses(server: Server, reference: list[list[int]]) -> None:
    answer = server.generate(PROMPTS[0], MAX_TOKENS).json()
    assert (answer.get("output_ids") or answer["token_ids"]) == reference[0]
    # 4 MiB are 1024 slots, of which a page is SGLang's padding's; SGLang believes in 16384.
    too_long = server.generate([7 + n % 900 for n in range(1200)], 4)
    assert too_long.status_code == 400, too_long.text
    assert "1200" in too_long.text or "longer" in too_long.text
    assert server.generate(PROMPTS[1], MAX_TOKENS).status_code == 200
