"""The devices of an engine, as kvcached names and opens them; common to all engines.

Every process of the engine answers these questions by itself, and none needs a CUDA context for
them; only ``open_backend``, in a worker, makes one.
"""

from __future__ import annotations

import logging
import resource
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from kvcached import devices, nvml
from kvcached.config import Config, default_capacity
from kvcached.errors import EngineError, LedgerError
from kvcached.foreign import Memory
from kvcached.layout import CUDA_LIMITS, HOST_LIMITS, PageLimits, max_arena_mappings
from kvcached.ledger import Account, Ledger
from kvcached.units import MIB, format_size
from kvcached.vmm_ops import Backend, cuda_backend, host_backend

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Device(ABC):
    """What both kinds of device answer."""

    name: str
    granularity: int
    """The smallest piece of memory that it maps, in bytes."""
    page_limits: PageLimits
    max_mappings: int | None
    """Mappings that one arena may have; None where only pages count."""

    @abstractmethod
    def default_capacity(self) -> tuple[int, str]:
        """Bytes that engines share if nothing else is said, and what they are in words."""

    @abstractmethod
    def default_headroom(self, capacity: int) -> int:
        """Bytes of a capacity that leases leave alone if nothing else is said."""

    @property
    @abstractmethod
    def memory(self) -> Memory | None:
        """Asks what is in use on the device; None where its capacity is for pages alone."""

    @abstractmethod
    def open_backend(self, ordinal: int, above_fd: int) -> Backend:
        """The backend of a worker. ``ordinal`` counts the GPUs that its process sees; memory files
        are numbered above ``above_fd`` (the liveness lock).
        """


@dataclass(frozen=True, slots=True)
class HostDevice(Device):
    """The host's memory under a name. Its capacity is for KV caches alone."""

    def default_capacity(self) -> tuple[int, str]:
        return default_capacity(), "half of what is available"

    def default_headroom(self, capacity: int) -> int:
        return 0

    @property
    def memory(self) -> Memory | None:
        return None

    def open_backend(self, ordinal: int, above_fd: int) -> Backend:
        return host_backend(self.name.removeprefix("host:"), above_fd)


@dataclass(frozen=True, slots=True)
class GpuDevice(Device):
    """A GPU, named by its UUID."""

    gpu: nvml.Gpu = field(repr=False)

    def default_capacity(self) -> tuple[int, str]:
        return self.gpu.memory()[1], "all of the GPU's memory"

    def default_headroom(self, capacity: int) -> int:
        return devices.gpu_headroom(capacity, self.gpu.memory()[1])

    @property
    def memory(self) -> Memory | None:
        return self.gpu.memory

    def open_backend(self, ordinal: int, above_fd: int) -> Backend:
        _check_ordinal(ordinal, self.name)
        backend = cuda_backend(ordinal)
        if backend.granularity != self.granularity:
            raise EngineError(
                f"kvcached: {self.name} maps memory in pieces of {backend.granularity} bytes, and "
                f"its scheduler counts in pieces of {self.granularity}: not supported"
            )
        return backend


@dataclass(frozen=True, slots=True)
class Devices:
    """Where the ranks of an engine map memory."""

    by_rank: tuple[Device, ...]

    @property
    def distinct(self) -> tuple[Device, ...]:
        """Each device once, in the order of their names: in this order all engines ask."""
        by_name = {device.name: device for device in self.by_rank}
        return tuple(by_name[name] for name in sorted(by_name))

    @property
    def ranks_each(self) -> int:
        """How many ranks share each device: as many times over a page is created there."""
        return len(self.by_rank) // len(self.distinct)


def arrange(config: Config, ranks: int, of_rank: Callable[[int, str | None], Device]) -> Devices:
    """The devices of an engine's ranks. ``of_rank`` makes one from the rank and the name that was
    chosen for it, if any.

    Raises EngineError where the names that were chosen do not fit the ranks.
    """
    names = config.devices
    if len(names) not in (0, 1, ranks):
        raise EngineError(
            f"kvcached: KVCACHED_DEVICE names {len(names)} devices ({','.join(names)}), but the "
            f"engine has {ranks} {'rank' if ranks == 1 else 'ranks'} (tensor_parallel_size): "
            "expected one for all or one for each"
        )
    by_rank: Sequence[str | None] = names * ranks if len(names) == 1 else names or [None] * ranks
    found = Devices(tuple(of_rank(rank, name) for rank, name in enumerate(by_rank)))
    if len({*Counter(device.name for device in found.by_rank).values()}) != 1:
        raise EngineError(
            f"kvcached: KVCACHED_DEVICE={','.join(names)} gives some devices more ranks than "
            "others: not supported"
        )
    return found


def host(chosen: str | None, engine: str) -> HostDevice:
    """The host's memory under the chosen name, for an engine on ``engine`` (its kind, in words)."""
    name = chosen or devices.DEFAULT_HOST_DEVICE
    if not name.startswith("host:"):
        raise EngineError(
            f"kvcached: KVCACHED_DEVICE={name}, but this engine runs on {engine}: "
            "expected host:NAME"
        )
    return HostDevice(
        name=name,
        granularity=resource.getpagesize(),
        page_limits=HOST_LIMITS,
        max_mappings=max_arena_mappings(),
    )


def gpu(uuid: str, chosen: str | None) -> GpuDevice:
    """The GPU that the engine was given; ``chosen`` may only name that one."""
    if chosen is not None and chosen.startswith("host:"):
        raise EngineError(f"kvcached: KVCACHED_DEVICE={chosen}, but this engine runs on a GPU")
    if chosen is not None and chosen.removeprefix("cuda:").isdecimal():
        chosen = nvml.uuid_of(int(chosen.removeprefix("cuda:")))
    if chosen is not None and chosen != uuid:
        raise EngineError(
            f"kvcached: KVCACHED_DEVICE={chosen}, but this engine runs on {uuid}: leave it unset, "
            "the engine's own GPU is found (CUDA_VISIBLE_DEVICES chooses it)"
        )
    return GpuDevice(
        name=uuid,
        # What CUDA's driver asks for on every GPU with virtual memory management so far; the
        # worker, which has a context, asks it and refuses to start if it says something else.
        granularity=2 * MIB,
        page_limits=CUDA_LIMITS,
        max_mappings=None,
        gpu=nvml.Gpu(uuid),
    )


def _check_ordinal(ordinal: int, name: str) -> None:
    """That CUDA and the driver's management library mean the same GPU by their numbers."""
    import torch

    seen = str(torch.cuda.get_device_properties(ordinal).uuid)
    if seen != name.partition("-")[2]:
        raise EngineError(
            f"kvcached: this worker runs on {seen}, and its memory would be counted on {name}: "
            "set CUDA_DEVICE_ORDER=PCI_BUS_ID, or name the GPU in CUDA_VISIBLE_DEVICES by its UUID"
        )


def open_ledger(config: Config, device: Device) -> Ledger:
    """The device's ledger, made by whoever comes first; its capacity is then said in the log.

    Raises LedgerError where the ledger exists with another capacity than the one asked for.
    """

    def headroom(capacity: int) -> int:
        if config.headroom is None:
            return device.default_headroom(capacity)
        return config.headroom.of(capacity)

    wanted = config.capacity_bytes
    if wanted is not None:
        return Ledger.open(config.directory, device.name, wanted, headroom(wanted))
    try:
        return Ledger.open(config.directory, device.name, create=False)
    except LedgerError:
        capacity, words = device.default_capacity()
    try:
        ledger = Ledger.open(config.directory, device.name, capacity, headroom(capacity))
    except LedgerError:  # somebody else made it in between, with their own default
        return Ledger.open(config.directory, device.name, create=False)
    logger.info(
        "kvcached: %s has a capacity of %s, %s, less a headroom of %s (KVCACHED_CAPACITY and "
        "KVCACHED_HEADROOM set them)",
        device.name,
        format_size(capacity),
        words,
        format_size(ledger.headroom),
    )
    return ledger


def open_ledgers(config: Config, devices: Devices) -> list[Ledger]:
    """The ledger of each distinct device; see ``open_ledger``."""
    return [open_ledger(config, device) for device in devices.distinct]


def join(
    config: Config, ledgers: Iterable[Ledger], instance: str, name: str, page_bytes: int
) -> list[Account]:
    """An engine's accounts, one on each device, as the environment says about it: its limit, its
    guarantee, its weight. Raises as ``Ledger.join`` and the setters of ``Ledger``.
    """
    accounts = []
    for ledger in ledgers:
        accounts.append(ledger.join(instance, name, page_bytes))
        if config.limit is not None:
            ledger.set_limit(instance, config.limit.of(ledger.capacity))
        if guarantee := config.guarantee.of(ledger.capacity):
            ledger.set_guarantee(instance, guarantee)
        if config.weight != 1.0:
            ledger.set_weight(instance, config.weight)
    return accounts
