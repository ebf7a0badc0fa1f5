"""An engine that is played: a page pool, and a thread that does what an idle engine does."""

from __future__ import annotations

import threading

from page_pools import PAGE, PER_PAGE, Instance

from kvcached.ledger import Ledger


class Engine:
    """An instance whose thread gives memory back when the pressure rises."""

    def __init__(self, ledger: Ledger, name: str, cached_pages: int, used_pages: int = 0) -> None:
        self.one = Instance(ledger, name)
        self.one.account.describe(PAGE // PER_PAGE, 16, PAGE)
        held = self.one.alloc((cached_pages + used_pages) * PER_PAGE)
        self.one.carry()
        self.one.blocks.free(held[used_pages * PER_PAGE :], cached=True)
        self.one.pool.publish()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        account = self.one.account
        seen = account.pressure_seq
        while not self._over.is_set():
            self.one.now_s += 1.0
            self.one.pool.relieve()
            self.one.carry()
            seen = account.wait_pressure(seen, 0.02)

    def close(self) -> None:
        self._over.set()
        self._thread.join()
