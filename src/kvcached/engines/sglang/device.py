"""The device of an SGLang engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvcached import nvml
from kvcached.config import Config, variable_of_an_engine
from kvcached.engines import devices
from kvcached.engines.devices import Device


def kind_of(arguments: Mapping[str, Any]) -> str:
    """What SGLang calls the kind of its device: ``cpu``, ``cuda``."""
    return str(arguments["device"]).partition(":")[0]


def ordinal(arguments: Mapping[str, Any]) -> int:
    """The number of the engine's GPU among those that its process sees."""
    return int(arguments.get("base_gpu_id") or 0)


def of(config: Config, arguments: Mapping[str, Any]) -> Device:
    """The host's memory under the name that was chosen, or the engine's GPU.

    Raises EngineError where the name that was chosen does not fit.
    """

    def of_rank(_: int, chosen: str | None) -> Device:
        if kind_of(arguments) == "cpu":
            return devices.host(chosen, "the CPU")
        visible = variable_of_an_engine("CUDA_VISIBLE_DEVICES")
        return devices.gpu(nvml.visible_uuid(ordinal(arguments), visible), chosen)

    (found,) = devices.arrange(config, 1, of_rank).by_rank
    return found
