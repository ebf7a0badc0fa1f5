"""What engines hold in all, from outside."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from kvcached.demo.sampler import SessionWatch


class MemoryWatch:
    """Samples the memory of engines by their sessions, every few milliseconds, in a thread.

    ``sessions`` is asked each time: an engine that is started again has a new one.
    """

    INTERVAL_S = 0.004

    def __init__(self, sessions: Callable[[], Iterable[int]]) -> None:
        self.peak = 0
        self.samples = 0
        self._sessions = sessions
        self._watches: dict[int, SessionWatch] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _total(self) -> int:
        total = 0
        for session in self._sessions():
            if session not in self._watches:
                self._watches[session] = SessionWatch(session)
            total += self._watches[session].physical_bytes()
        return total

    def _run(self) -> None:
        while not self._end.wait(self.INTERVAL_S):
            total = self._total()
            if total > self.peak:
                # Two files are not read at one moment: bytes that went from one to the other in
                # between would count twice. What is really there is there the next time too.
                total = min(total, self._total(), self._total())
            self.peak = max(self.peak, total)
            self.samples += 1

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
