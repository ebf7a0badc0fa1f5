"""kvcached: elastic, shared KV-cache memory for several LLM engines on one device."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvcached.holds import Hold

__version__ = "0.1.0"

__all__ = ["__version__", "hold"]


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
