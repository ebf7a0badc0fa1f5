"""The last minutes of every ledger, for the page: a thread looks once a second."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

from kvcached.cli.output import ledger_fields
from kvcached.cli.watching import History as Looks
from kvcached.closing import Closing
from kvcached.observe import Observer

KEPT = 600
"""Samples that are kept, and twice as many events."""


class History(Closing):
    """Samples and events in order. Any thread may ask."""

    def __init__(self, observer: Observer, interval_s: float) -> None:
        self.interval_s = interval_s
        self._observer = observer
        self._looks = Looks()
        self._lock = threading.Lock()
        self._samples: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._events: deque[dict[str, Any]] = deque(maxlen=2 * KEPT)
        self._now: list[dict[str, Any]] = []
        self._sequence = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvcached-history", daemon=True)

    def start(self) -> None:
        """Takes a first sample, then one each interval."""
        self._look()
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(self.interval_s):
            self._look()

    def _look(self) -> None:
        ledgers, now_s = self._observer.read(), round(time.time(), 3)
        happened = self._looks.events(ledgers)
        devices = {
            ledger.device: {
                "capacity": ledger.capacity,
                "foreign": ledger.foreign,
                "charges": {account.instance: account.charge for account in ledger.accounts},
            }
            for ledger in ledgers
        }
        with self._lock:
            self._sequence += 1
            place = {"sequence": self._sequence, "time_s": now_s}
            self._samples.append({**place, "devices": devices})
            self._now = [ledger_fields(ledger) for ledger in ledgers]
            for event in happened:
                subject = {"device": event.device, "instance": event.instance, "name": event.name}
                fields = {"event": event.kind, **subject, "text": str(event)}
                self._events.append({**place, **fields})

    def since(self, sequence: int) -> dict[str, Any]:
        """The ledgers at the last look, and all samples and events after this sequence number."""
        with self._lock:
            return {
                "sequence": self._sequence,
                "devices": self._now,
                "samples": [each for each in self._samples if each["sequence"] > sequence],
                "events": [each for each in self._events if each["sequence"] > sequence],
            }

    def close(self) -> None:
        """Ends the thread."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        self._observer.close()
