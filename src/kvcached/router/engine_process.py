"""One run of an engine: its processes, from their start until none of them is left."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time

from kvcached.processes import session_processes, stopped_processes
from kvcached.router.engine_command import EngineCommand
from kvcached.router.guard import Guard
from kvcached.router.logs import EngineLog

logger = logging.getLogger(__name__)

_LOOK_S = 0.05
_READ = 64 * 1024
_KILL_LIMIT_S = 60.0
_LAST_WORDS_S = 1.0


class EngineProcess:
    """The first process of an engine leads a session, which all the others stay in."""

    def __init__(
        self, process: asyncio.subprocess.Process, guard: Guard, reader: asyncio.Task[None]
    ) -> None:
        self._process = process
        self._guard = guard
        self._reader = reader

    @classmethod
    async def start(cls, command: EngineCommand, guard: Guard, log: EngineLog) -> EngineProcess:
        """Starts it. Raises OSError where the program cannot be run."""
        # A pipe of our own: asyncio's would have `wait` last until the engine's other processes,
        # which hold it too, have ended (Python 3.11 and later).
        ours, its = os.pipe()
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, ours)
            try:
                process = await asyncio.create_subprocess_exec(
                    *command.arguments,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=its,
                    stderr=its,
                    env={**command.environment, **guard.environment},
                    start_new_session=True,
                )
            finally:
                os.close(its)
            undo.pop_all()
        guard.watch(process.pid)
        return cls(process, guard, asyncio.create_task(_follow(ours, log)))

    @property
    def pid(self) -> int:
        """Of the first process, and the number of the session."""
        return self._process.pid

    @property
    def code(self) -> int | None:
        """What the first process ended with (negative: the signal); None while it runs."""
        return self._process.returncode

    def stopped(self) -> list[int]:
        """Its processes that a signal has stopped."""
        return stopped_processes(self.pid)

    async def ended(self) -> int:
        """Waits for the end of the first process; returns what it ended with."""
        return await self._process.wait()

    async def stop(self, limit_s: float) -> None:
        """Asks it to end, and kills what is left after ``limit_s`` seconds."""
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            end = asyncio.create_task(self.ended())
            try:
                await asyncio.wait({end}, timeout=limit_s)
            finally:
                end.cancel()
        await self.kill()

    async def kill(self) -> None:
        """Kills all of its processes; returns when none is left. May be called again.

        What the kernel does not let go of (a driver that hangs) is left, and logged.
        """
        end_s = time.monotonic() + _KILL_LIMIT_S
        while pids := session_processes(self.pid):
            if time.monotonic() > end_s:
                logger.error("processes %s do not end though they were killed", pids)
                return
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(_LOOK_S)
        await self.ended()
        self._guard.forget(self.pid)
        # The pipe closes with the last process; a stranger that inherited it must not hold us up.
        await asyncio.wait([self._reader], timeout=_LAST_WORDS_S)
        self._reader.cancel()


async def _follow(descriptor: int, log: EngineLog) -> None:
    """Reads until the last process that holds the pipe has ended; closes it.

    Without a transport: uvloop's closes a pipe once more than it may, by when its number can be
    that of a client's connection.
    """
    loop = asyncio.get_running_loop()
    ended = loop.create_future()

    def readable() -> None:
        with contextlib.suppress(BlockingIOError):
            if printed := os.read(descriptor, _READ):
                log.take(printed)
            elif not ended.done():
                ended.set_result(None)

    os.set_blocking(descriptor, False)
    loop.add_reader(descriptor, readable)
    try:
        await ended
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
        log.end()
