"""Pressure from others on an engine that sleeps, and the rows of the dead."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Any

from kvcached.engines import surroundings
from kvcached.engines.devices import Device
from kvcached.engines.sglang.engine import ElasticEngine
from kvcached.ledger import Account, Ledger


def follow(engine: ElasticEngine, sleeper: Any) -> None:
    """Wakes the engine when others want memory on any of its devices. Of several ranks the first
    looks, and the others do what it does.

    SGLang's loop turns all the time, and then looks at the pressure in each turn; or it sleeps
    in a poll over its sockets (``--sleep-on-idle``): then one more descriptor joins them.
    """
    if not engine.accounts:
        return
    bell = None
    if sleeper is not None:
        bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        sleeper.poller.register(bell, _POLLIN)
        sleeper.maybe_sleep = _answering(sleeper.maybe_sleep, bell)
    build = engine.build
    for account, place in zip(engine.accounts, build.devices.distinct, strict=True):
        threading.Thread(
            target=_follow,
            args=(account, build.ledgers[place.name], place, build.instance, bell),
            name="kvcached-pressure",
            daemon=True,
        ).start()


_POLLIN = 1  # zmq.POLLIN


def _answering(maybe_sleep: Any, bell: int) -> Any:
    def sleep() -> None:
        maybe_sleep()
        with contextlib.suppress(BlockingIOError):  # it was something else that woke it
            os.eventfd_read(bell)

    return sleep


def _follow(
    account: Account, ledger: Ledger, place: Device, instance: str, bell: int | None
) -> None:
    for _ in surroundings.Lookout(account, ledger, place.memory, instance).rounds():
        if bell is not None and account.pressed():
            os.eventfd_write(bell, 1)
