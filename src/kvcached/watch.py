"""Processes that end together: an instance must not outlive any one of its processes.

A process that maps memory and outlives its engine would hold that memory for nobody. PDEATHSIG
does not serve: it fires when the thread that forked ends, and misses a parent that is already
gone. A pidfd of each process that matters, watched by one thread of our own, has neither flaw.
A process that watches is itself noticed at once when it is killed, before the kernel takes down its
memory (Linux 6.9 or newer; csrc/watch.cpp).
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable

from kvcached import vmm_ops


def end_with(pids: Iterable[int], grace_s: float = 0.0) -> None:
    """Ends this process (SIGKILL) ``grace_s`` seconds after any of ``pids`` has ended.

    SIGKILL, because an engine's own handlers wait for the very process that is gone; the kernel
    then frees memory and locks at once. A pid that is gone already counts as ended. Returns at
    once: a thread of the core watches, so that a busy interpreter delays nothing.
    """
    vmm_ops.end_with(sorted(set(pids)), grace_s)


def end_with_parent(*others: int) -> None:
    """Ends this process when its parent or one of ``others`` (pids) has ended, also where that
    happened before this call. Watching the whole line of parents saves each one's dying time.
    """
    parent = multiprocessing.parent_process()  # who started us, even if it is gone already
    pid = os.getppid() if parent is None or parent.pid is None else parent.pid
    end_with({pid, *others})


def end_with_found(
    find: Callable[[], Iterable[int] | None], grace_s: float = 0.0, every_s: float = 0.1
) -> None:
    """``end_with`` the pids that ``find`` returns, as soon as it returns some: until then a thread
    asks it again, every ``every_s`` seconds. Returns at once.
    """

    def look() -> None:
        while (pids := find()) is None:
            time.sleep(every_s)
        end_with(pids, grace_s)

    threading.Thread(target=look, name="kvcached-follow", daemon=True).start()
