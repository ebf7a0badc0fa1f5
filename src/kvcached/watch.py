"""Processes that end together: an instance must not outlive any one of its processes.

A process that maps memory and outlives its engine would hold that memory for nobody. PDEATHSIG
does not serve: it fires when the thread that forked ends, and misses a parent that is already
gone. A pidfd of each process that matters, watched by one thread of our own, has neither flaw.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterable

logger = logging.getLogger(__name__)


def end_with(pids: Iterable[int], grace_s: float = 0.0) -> threading.Thread:
    """Ends this process (SIGKILL) ``grace_s`` seconds after any of ``pids`` has ended.

    SIGKILL, because an engine's own handlers wait for the very process that is gone; the kernel
    then frees memory and locks at once. A pid that is gone already counts as ended.
    """
    descriptors = {_pidfd(pid): pid for pid in pids}

    def die(pid: int) -> None:
        logger.error("kvcached: process %d of this instance has ended; ending with it", pid)
        time.sleep(grace_s)
        os.kill(os.getpid(), signal.SIGKILL)

    return _watch(descriptors, die)


def end_with_parent() -> threading.Thread:
    """Ends this process when its parent has ended, also where that happened before this call."""
    parent = multiprocessing.parent_process()  # who started us, even if it is gone already
    return end_with([os.getppid() if parent is None or parent.pid is None else parent.pid])


def _pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return -pid  # ended already: no descriptor, reported at once


def _watch(descriptors: dict[int, int], ended: Callable[[int], None]) -> threading.Thread:
    def run() -> None:
        poll = select.poll()
        for descriptor, pid in descriptors.items():
            if descriptor < 0:
                ended(pid)
                return
            poll.register(descriptor, select.POLLIN)
        for descriptor, _ in poll.poll():
            ended(descriptors[descriptor])
            return

    thread = threading.Thread(target=run, name="kvcached-watch", daemon=True)
    thread.start()
    return thread
