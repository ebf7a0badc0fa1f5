"""The device of a vLLM engine, as kvcached names and opens it."""

from __future__ import annotations

import logging
import resource

from kvcached.config import Config, default_capacity
from kvcached.errors import EngineError, LedgerError
from kvcached.ledger import Ledger
from kvcached.units import format_size
from kvcached.vmm_ops import Backend, host_backend

logger = logging.getLogger(__name__)

DEFAULT_HOST_DEVICE = "host:default"


def name(config: Config) -> str:
    """The device's name: what ``KVCACHED_DEVICE`` says, or the host's memory on a CPU engine."""
    from vllm.platforms import current_platform

    chosen = config.device or (DEFAULT_HOST_DEVICE if current_platform.is_cpu() else "")
    if not chosen.startswith("host:"):
        raise EngineError(
            f"kvcached: device {chosen or 'GPU'}: with this version of vLLM kvcached supports its "
            "CPU platform (KVCACHED_DEVICE=host:NAME) only, so far"
        )
    return chosen


def granularity() -> int:
    """The smallest piece of memory that the device maps, in bytes."""
    return resource.getpagesize()


def open_ledger(config: Config) -> Ledger:
    """The device's ledger, made by whoever comes first; its capacity is then said in the log.

    Raises LedgerError where the ledger exists with another capacity than the one asked for.
    """
    device = name(config)
    if config.capacity_bytes is not None:
        headroom = config.headroom.of(config.capacity_bytes)
        return Ledger.open(config.directory, device, config.capacity_bytes, headroom)
    try:
        return Ledger.open(config.directory, device, create=False)
    except LedgerError:
        capacity = default_capacity()
    try:
        ledger = Ledger.open(config.directory, device, capacity, config.headroom.of(capacity))
    except LedgerError:  # somebody else made it in between, with their own default
        return Ledger.open(config.directory, device, create=False)
    logger.info(
        "kvcached: %s has a capacity of %s, half of what is available (KVCACHED_CAPACITY sets it)",
        device,
        format_size(capacity),
    )
    return ledger


def open_backend(config: Config, above_fd: int) -> Backend:
    """The backend; its memory files are numbered above ``above_fd`` (the liveness lock)."""
    return host_backend(name(config).removeprefix("host:"), above_fd)
