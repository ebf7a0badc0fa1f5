"""``kvcached bench idle``: what the threads that wait for pressure cost while nothing happens.

The very threads of an engine, each with a ledger handle and an account of its own, beside stand-ins
for the rest of the scheduler. They are first left alone, then rung: another account raises its
demand again and again, and each watcher looks whether anything is its own to give.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcached.foreign import Memory
from kvcached.ledger import Account, Ledger

PAGE_BYTES = 2 << 20
RINGS_PER_S = 10


@dataclass(frozen=True, slots=True)
class _Pages:
    page_bytes: int = PAGE_BYTES

    def rested(self) -> bool:
        return False

    def gives(self) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class _Device:
    memory: Memory | None


def run(watchers: int, seconds: float, gpu: bool) -> dict[str, Any]:
    """Measures ``watchers`` threads for ``seconds``, quiet and rung. With ``gpu`` each of them
    also measures foreign memory every second, as on a GPU. Needs vLLM.
    """
    from kvcached.engines.vllm.idle import follow_pressure

    capacity = (watchers + 2) * PAGE_BYTES
    with tempfile.TemporaryDirectory(prefix="kvcached-idle-") as folder:
        ledgers = [
            Ledger.open(Path(folder) / "ledger", "host:idle", capacity) for _ in range(watchers + 1)
        ]
        memory = (lambda: (0, capacity)) if gpu else None
        wakes: list[float] = []
        threads = []
        for number, ledger in enumerate(ledgers[:-1]):
            instance = f"i{number}"
            account = ledger.join(instance, instance)
            account.lease(PAGE_BYTES)
            account.publish(PAGE_BYTES, 0, 0)
            threads.append(
                threading.Thread(
                    target=follow_pressure,
                    args=(
                        *(_Pages(), lambda: wakes.append(0.0)),
                        *(account, ledger, _Device(memory), instance),
                    ),
                )
            )
            threads[-1].start()
        other = ledgers[-1].join("other", "other")
        time.sleep(0.5)
        quiet = _cpu(seconds)
        rung = _cpu(seconds, other)
        for ledger in ledgers:
            ledger.close()
        for thread in threads:
            thread.join()
    return {
        "watchers": watchers,
        "seconds": seconds,
        "gpu": gpu,
        "quiet_cpu_percent": quiet,
        "rung_cpu_percent": rung,
        "rings_per_s": RINGS_PER_S,
        "cpus": os.cpu_count(),
    }


def _cpu(seconds: float, other: Account | None = None) -> float:
    """The process's time on a core meanwhile, in percent of one."""
    before_s, end_s = time.process_time(), time.monotonic() + seconds
    while (left := end_s - time.monotonic()) > 0:
        if other is None:
            time.sleep(left)
        else:
            other.set_demand(PAGE_BYTES)
            other.set_demand(0)
            time.sleep(1 / RINGS_PER_S)
    return round(100 * (time.process_time() - before_s) / seconds, 4)
