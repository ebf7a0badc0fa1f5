"""A real process that does to a ledger what a test tells it to, and can be killed at any moment."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MIB = 1 << 20
CAPACITY = 100 * MIB


class Remote:
    """Runs Python statements in a process of its own; ``ledger`` is open there.

    The last line's value comes back if it is an expression, a raised exception as RuntimeError.
    """

    def __init__(self, directory: Path, device: str = "host:test", *inside: str) -> None:
        """``inside``: a command that runs it, such as one that makes a namespace."""
        self.process = subprocess.Popen(
            [*inside, sys.executable, __file__, str(directory), device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid

    def send(self, *lines: str) -> None:
        """Starts the statements and does not wait for them."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(lines) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        """The value of what was sent last."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EOFError(f"process {self.pid} ended")
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply["value"]

    def run(self, *lines: str) -> Any:
        self.send(*lines)
        return self.answer()

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, and waits until the process is gone."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def stop(self) -> None:
        """SIGSTOP, and waits until it has stopped."""
        self.signal(signal.SIGSTOP)
        wait_until(lambda: "\nState:\tT" in Path(f"/proc/{self.pid}/status").read_text())


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> float:
    """Seconds until the condition holds; fails when it does not in time."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "timed out"
        time.sleep(0.002)
    return time.monotonic() - start


def _serve(directory: str, device: str) -> None:
    from kvcached.ledger import Ledger

    scope: dict[str, Any] = {"ledger": Ledger.open(Path(directory), device, CAPACITY), "os": os}
    for line in sys.stdin:
        *body, last = json.loads(line)
        try:
            exec("\n".join(body), scope)
            try:
                code = compile(last, "last", "eval")
            except SyntaxError:
                exec(last, scope)
                reply = {"value": None}
            else:
                reply = {"value": eval(code, scope)}
        except Exception as error:  # noqa: BLE001 - the process's edge: it reports
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
