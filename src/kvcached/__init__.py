"""kvcached: elastic, shared KV-cache memory for several LLM engines on one device."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvcached.control import Pool
    from kvcached.holds import Hold

__version__ = "0.1.0"

__all__ = ["__version__", "hold", "open_pool"]


def hold(size: int | str, *, device: str | None = None, timeout_s: float | None = None) -> Hold:
    """Keeps so much of a device's memory from the engines that share it, while a block runs:

        with kvcached.hold("20GiB"):
            train()

    Returns when so much is really free: cached memory of the engines goes back at once, memory in
    use as requests end. What the block then takes on a GPU is not counted twice (see
    ``kvcached.holds``). The hold ends with the block, and with the process in any case.

    ``size`` is in bytes, or written as people do (``512MiB``). ``device`` is ``KVCACHED_DEVICE``,
    or else the one that engines share, unless it is named. Any thread may call it.

    Raises OutOfMemoryError, naming who has the memory, if ``timeout_s`` was not enough (None waits
    for ever); ConfigError, InvalidArgumentError, UnavailableError, LedgerError.
    """
    from kvcached.holds import hold as make  # engines import this package with kvcached off

    return make(size, device=device, timeout_s=timeout_s)


def open_pool(device: str | None = None, *, read_only: bool = False) -> Pool:
    """Opens the memory that engines share, to see who holds what and to set who may:

        with kvcached.open_pool() as pool:
            print(pool.snapshot().free)
            pool.set_limit("chat", "40%")

    ``device`` is ``KVCACHED_DEVICE``, or else the one that engines share, unless it is named
    (``host:demo``, a GPU's UUID or its index). ``read_only`` needs no permission to write, and
    allows only looking. Any thread may call it; see ``kvcached.control`` for what a pool can do.

    Raises LedgerError where no engine shares the device, ConfigError, UnavailableError.
    """
    from kvcached.control import open_pool as make

    return make(device, read_only=read_only)
