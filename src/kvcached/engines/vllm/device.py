"""The devices of a vLLM engine."""

from __future__ import annotations

from kvcached.config import Config
from kvcached.engines import devices
from kvcached.engines.devices import Device, Devices, open_ledger, open_ledgers

__all__ = ["Device", "Devices", "of", "open_ledger", "open_ledgers"]


def of(config: Config, ranks: int = 1) -> Devices:
    """The devices of the engine in this process's vLLM: the host's memory under the names that
    were chosen, or the GPUs that vLLM gives to its ranks.

    Raises EngineError where the names that were chosen do not fit the ranks.
    """
    return devices.arrange(config, ranks, _of_rank)


def _of_rank(rank: int, chosen: str | None) -> Device:
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return devices.host(chosen, "vLLM's CPU platform")
    return devices.gpu(current_platform.get_device_uuid(rank), chosen)
