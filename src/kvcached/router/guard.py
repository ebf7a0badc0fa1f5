"""Leaves no engine behind when the service is killed: a small process that outlives it and acts.

The service tells its guard which sessions it has started, over a pipe that closes when the service
ends in whatever way. What was started and not told yet is found by a token in its environment. The
guard is in a session of its own, so nothing that is sent to the service's reaches it.

A parent-death signal would not do: it fires when the *thread* that forked ends, is lost at the exec
of a program with other rights, and reaches only the engine's first process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import sys
import time

from kvcached.processes import is_in_session

logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "SERVED_BY_KVCACHED"
_END = "end\n"
_QUIET_S = 0.5  # nothing was found for so long: a fork that was under way has become visible
_LOOK_S = 0.05


class Guard:
    """The service's side. Runs on the event loop."""

    def __init__(self) -> None:
        self.token = secrets.token_hex(16)
        self._sessions: set[int] = set()
        self._process: asyncio.subprocess.Process | None = None
        self._pipe: int | None = None
        self._keeper: asyncio.Task[None] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What a process must have in its environment, so that it is found."""
        return {TOKEN_VARIABLE: self.token}

    @property
    def pid(self) -> int | None:
        """The guard's process."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Starts the guard's process, and another one whenever it ends."""
        self._process = await self._spawn()
        self._keeper = asyncio.create_task(self._keep(), name="guard")

    def watch(self, session: int) -> None:
        """Ends this session's processes if the service ends first."""
        self._sessions.add(session)
        self._tell(f"+{session}\n")

    def forget(self, session: int) -> None:
        """The session has no processes any more; its number may be given to another one."""
        self._sessions.discard(session)
        self._tell(f"-{session}\n")

    async def end(self) -> None:
        """Lets the guard's process end; it touches nothing."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        if self._process is not None:
            self._tell(_END)
            await self._process.wait()
        self._close_pipe()

    async def _spawn(self) -> asyncio.subprocess.Process:
        its, ours = os.pipe()
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, ours)
            try:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", __name__, self.token),
                    stdin=its,
                    stdout=asyncio.subprocess.DEVNULL,
                    start_new_session=True,
                )
            finally:
                os.close(its)
            undo.pop_all()
        self._close_pipe()
        self._process, self._pipe = process, ours
        for session in self._sessions:
            self._tell(f"+{session}\n")
        return process

    async def _keep(self) -> None:
        assert self._process is not None
        while True:
            code = await self._process.wait()
            logger.warning("the guard (process %d) ended with %d", self._process.pid, code)
            await asyncio.sleep(1.0)
            await self._spawn()

    def _tell(self, line: str) -> None:
        if self._pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # its successor will be told
                os.write(self._pipe, line.encode())

    def _close_pipe(self) -> None:
        if self._pipe is not None:
            os.close(self._pipe)
        self._pipe = None


def main(token: str) -> None:
    """The guard's process: reads what is to be watched until the service has ended."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sessions: set[int] = set()
    for line in sys.stdin:
        if line == _END:
            return
        session = int(line[1:])
        if line[0] == "+":
            sessions.add(session)
        else:
            sessions.discard(session)
    _end_all(sessions, f"{TOKEN_VARIABLE}={token}".encode())


def _end_all(sessions: set[int], mark: bytes) -> None:
    quiet_since_s = time.monotonic()
    while time.monotonic() - quiet_since_s < _QUIET_S:
        pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
        for pid in pids:
            marked = pid != os.getpid() and _is_marked(pid, mark)
            if marked:
                # What it has started has its session, and may have overwritten its environment.
                with contextlib.suppress(ProcessLookupError):
                    sessions.add(os.getsid(pid))
            if marked or any(is_in_session(pid, session) for session in sessions):
                quiet_since_s = time.monotonic()
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(_LOOK_S)


def _is_marked(pid: int, mark: bytes) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as stream:
            return mark in stream.read().split(b"\0")
    except OSError:
        return False  # it ended meanwhile, or is another user's


if __name__ == "__main__":
    main(sys.argv[1])
