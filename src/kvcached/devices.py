"""Which device a program means that is no engine, and its ledger: for holds and for tools.

An engine knows its device; a tool finds the one that engines share.
"""

from __future__ import annotations

from pathlib import Path

from kvcached import nvml
from kvcached.config import DEVICE_ALLOWED, Config, default_capacity, is_device
from kvcached.errors import ConfigError, LedgerError, UnavailableError
from kvcached.foreign import Memory
from kvcached.ledger import Ledger
from kvcached.vmm_ops import ledger_file_name

DEFAULT_HOST_DEVICE = "host:default"
# On a GPU others grow too: activations, graphs, libraries that load their kernels late. So much of
# it stays free, in what the ledger governs or beside it.
GPU_HEADROOM_PERCENT = 5
_PREFIX = "ledger-"


def shared(directory: Path) -> list[str]:
    """The devices that have a ledger in ``directory``, by name, sorted.

    Names that cannot be read back from a file's name are left out: they must be named. Raises
    LedgerError where there is something that cannot be read as a folder.
    """
    try:
        files = [path.name for path in directory.iterdir() if path.name.startswith(_PREFIX)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise LedgerError(f"{directory}: {error.strerror}") from None
    return sorted(name for name in map(_device_of, files) if name)


def _device_of(file_name: str) -> str:
    """The device whose ledger has this file name; empty where that cannot be told."""
    text = file_name.removeprefix(_PREFIX)
    candidates = (text, text.replace("-", ":", 1))
    return next((c for c in candidates if ledger_file_name(c) == file_name), "")


def find(config: Config, named: str | None = None) -> str:
    """The device that is meant: ``named``, or else ``KVCACHED_DEVICE``, or else the only one that
    engines share, or else the machine's first GPU, or else the host's default.

    Raises ConfigError for a name that no device can have, and where several are meant or shared and
    none is named; UnavailableError where the named GPU is not there; LedgerError as ``shared``.
    """
    if named:
        if not is_device(named):
            raise ConfigError(f"device {named!r}: expected {DEVICE_ALLOWED}")
        index = named.removeprefix("cuda:")
        return nvml.uuid_of(int(index)) if index.isdecimal() else named
    if config.devices:
        devices = sorted({find(config, name) for name in config.devices})
    else:
        devices = shared(config.directory)
    if len(devices) > 1:
        raise ConfigError(
            f"engines share several devices here: expected one of {', '.join(devices)} by name "
            "(--device, device= or KVCACHED_DEVICE)"
        )
    if devices:
        return devices[0]
    try:
        return nvml.uuid_of(0)
    except UnavailableError:
        return DEFAULT_HOST_DEVICE


def memory_of(device: str) -> Memory | None:
    """Asks what is in use on a GPU; None for the host's memory, whose capacity is for pages alone.

    Raises UnavailableError where there is no such GPU.
    """
    return None if device.startswith("host:") else nvml.Gpu(device).memory


def open_ledger(config: Config, device: str) -> Ledger:
    """The device's ledger, for writing. It is made, with the capacity that an engine would give
    it, where no engine has done so. Raises LedgerError.
    """
    try:
        return Ledger.open(config.directory, device, create=False)
    except LedgerError:
        if (config.directory / ledger_file_name(device)).exists():
            raise
    memory = memory_of(device)
    total = default_capacity() if memory is None else memory()[1]
    capacity = config.capacity_bytes or total
    headroom = 0 if memory is None else gpu_headroom(capacity, total)
    if config.headroom is not None:
        headroom = config.headroom.of(capacity)
    return Ledger.open(config.directory, device, capacity, headroom)


def gpu_headroom(capacity: int, total: int) -> int:
    """Bytes of a ledger's capacity that leases leave alone on a GPU if nothing else is said."""
    return max(0, total * GPU_HEADROOM_PERCENT // 100 - max(0, total - capacity))
