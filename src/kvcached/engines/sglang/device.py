"""The devices of an SGLang engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvcached import nvml
from kvcached.config import Config, variable_of_an_engine
from kvcached.engines import devices
from kvcached.engines.devices import Device, Devices


def kind_of(arguments: Mapping[str, Any]) -> str:
    """What SGLang calls the kind of its device: ``cpu``, ``cuda``."""
    return str(arguments["device"]).partition(":")[0]


def ordinal(arguments: Mapping[str, Any], rank: int) -> int:
    """The number of a rank's GPU among those that its process sees."""
    step = arguments.get("gpu_id_step")
    return int(arguments.get("base_gpu_id") or 0) + rank * (1 if step is None else int(step))


def of(config: Config, arguments: Mapping[str, Any]) -> Devices:
    """The host's memory under the names that were chosen, or the GPUs of the engine's ranks.

    Raises EngineError where the names that were chosen do not fit the ranks.
    """

    def of_rank(rank: int, chosen: str | None) -> Device:
        if kind_of(arguments) == "cpu":
            return devices.host(chosen, "the CPU")
        visible = variable_of_an_engine("CUDA_VISIBLE_DEVICES")
        return devices.gpu(nvml.visible_uuid(ordinal(arguments, rank), visible), chosen)

    return devices.arrange(config, int(arguments["tp_size"]), of_rank)
