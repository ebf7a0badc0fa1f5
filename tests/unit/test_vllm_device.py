"""What a vLLM engine's device is called and how much of it is shared, on either platform."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from kvcached import nvml
from kvcached.config import Config
from kvcached.engines import devices
from kvcached.engines.vllm import device
from kvcached.errors import ConfigError, EngineError, LedgerError
from kvcached.layout import CUDA_LIMITS, HOST_LIMITS
from kvcached.units import GIB, MIB

UUID = "GPU-01234567-89ab-cdef-0123-456789abcdef"
TOTAL = 140 * GIB


class Gpu:
    """Stands for the driver's management library."""

    def __init__(self, uuid: str) -> None:
        self.uuid = uuid

    def memory(self) -> tuple[int, int]:
        return 20 * GIB, TOTAL


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """vLLM as far as it is asked: ``cpu`` may be changed."""
    current = SimpleNamespace(cpu=False)
    current.is_cpu = lambda: current.cpu
    current.get_device_uuid = lambda index: UUID if index == 0 else f"GPU-{index}"
    platforms = ModuleType("vllm.platforms")
    platforms.current_platform = current  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    monkeypatch.setattr(nvml, "Gpu", Gpu)
    monkeypatch.setattr(nvml, "uuid_of", lambda index: UUID if index == 3 else "GPU-other")
    return current


def config(folder: Path, **variables: str) -> Config:
    return Config.from_env({"KVCACHED_DIR": str(folder / "ledger"), **variables})


def only(settings: Config) -> device.Device:
    """The device of an engine with one rank."""
    (found,) = device.of(settings).by_rank
    return found


@pytest.mark.parametrize("chosen", [None, UUID, "3", "cuda:3"])
def test_a_gpu_is_its_uuid(platform: SimpleNamespace, tmp_path: Path, chosen: str | None) -> None:
    found = only(config(tmp_path, **({"KVCACHED_DEVICE": chosen} if chosen else {})))
    assert (found.name, found.granularity, found.page_limits) == (UUID, 2 * MIB, CUDA_LIMITS)
    assert found.max_mappings is None
    assert found.memory is not None and found.memory() == (20 * GIB, TOTAL)


@pytest.mark.parametrize("chosen", ["host:demo", "GPU-ffff", "0"])
def test_an_engine_is_not_counted_on_another_device(
    platform: SimpleNamespace, tmp_path: Path, chosen: str
) -> None:
    with pytest.raises(EngineError, match=f"KVCACHED_DEVICE={chosen}|runs on {UUID}"):
        device.of(config(tmp_path, KVCACHED_DEVICE=chosen))


def test_without_a_gpu_it_is_the_hosts_memory(platform: SimpleNamespace, tmp_path: Path) -> None:
    platform.cpu = True
    found = only(config(tmp_path))
    assert (found.name, found.page_limits, found.memory) == ("host:default", HOST_LIMITS, None)
    assert only(config(tmp_path, KVCACHED_DEVICE="host:demo")).name == "host:demo"
    with pytest.raises(EngineError, match="expected host:NAME"):
        device.of(config(tmp_path, KVCACHED_DEVICE=UUID))


def test_a_gpus_memory_is_shared_but_for_a_twentieth(
    platform: SimpleNamespace, tmp_path: Path
) -> None:
    settings = config(tmp_path)
    with device.open_ledger(settings, only(settings)) as ledger:
        assert (ledger.capacity, ledger.headroom) == (TOTAL, TOTAL // 20)
    named = config(tmp_path, KVCACHED_CAPACITY=str(TOTAL // 2))
    with pytest.raises(LedgerError, match="capacity"):
        device.open_ledger(named, only(named))


@pytest.mark.parametrize(
    ("variables", "headroom"),
    [
        ({"KVCACHED_CAPACITY": str(TOTAL - 2 * GIB)}, 5 * GIB),
        ({"KVCACHED_CAPACITY": str(20 * GIB)}, 0),
        ({"KVCACHED_CAPACITY": str(20 * GIB), "KVCACHED_HEADROOM": "10%"}, 2 * GIB),
        ({"KVCACHED_HEADROOM": "0"}, 0),
    ],
)
def test_the_headroom_may_lie_beside_the_capacity(
    platform: SimpleNamespace, tmp_path: Path, variables: dict[str, str], headroom: int
) -> None:
    settings = config(tmp_path, **variables)
    with device.open_ledger(settings, only(settings)) as ledger:
        assert ledger.headroom == headroom


def test_a_worker_on_another_gpu_does_not_start(
    platform: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    opened = []

    def open_backend(ordinal: int) -> SimpleNamespace:
        opened.append(ordinal)
        return SimpleNamespace(granularity=2 * MIB * (1 + ordinal))

    monkeypatch.setattr(devices, "cuda_backend", open_backend)
    seen = {0: UUID[4:], 1: UUID[4:], 2: "ffffffff-89ab-cdef-0123-456789abcdef"}
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=seen[index])
    )
    found = only(config(tmp_path))
    assert found.open_backend(0, 5).granularity == 2 * MIB
    with pytest.raises(EngineError, match=rf"{4 * MIB}.*{2 * MIB}"):
        found.open_backend(1, 5)
    with pytest.raises(EngineError, match="CUDA_VISIBLE_DEVICES"):
        found.open_backend(2, 5)
    assert opened == [0, 1]


def names(found: device.Devices) -> list[str]:
    return [each.name for each in found.by_rank]


def test_every_rank_has_a_device(platform: SimpleNamespace, tmp_path: Path) -> None:
    """On GPUs those that vLLM gives to the ranks, whatever is named."""
    found = device.of(config(tmp_path), 3)
    assert names(found) == [UUID, "GPU-1", "GPU-2"]
    assert [each.name for each in found.distinct] == sorted(names(found))
    assert found.ranks_each == 1
    assert names(device.of(config(tmp_path, KVCACHED_DEVICE=f"3,GPU-{1}"), 2)) == [UUID, "GPU-1"]
    for wrong in ("GPU-1,3", UUID):  # another order, and one GPU for two ranks
        with pytest.raises(EngineError, match="leave it unset"):
            device.of(config(tmp_path, KVCACHED_DEVICE=wrong), 2)


@pytest.mark.parametrize(
    ("chosen", "by_rank", "each"),
    [
        ("", ["host:default"] * 2, 2),
        ("host:a", ["host:a"] * 2, 2),
        ("host:b,host:a", ["host:b", "host:a"], 1),
        ("host:a,host:a", ["host:a"] * 2, 2),
    ],
)
def test_ranks_on_the_host_share_what_they_are_told_to(
    platform: SimpleNamespace, tmp_path: Path, chosen: str, by_rank: list[str], each: int
) -> None:
    platform.cpu = True
    found = device.of(config(tmp_path, KVCACHED_DEVICE=chosen), 2)
    assert names(found) == by_rank
    assert [place.name for place in found.distinct] == sorted({*by_rank})
    assert found.ranks_each == each


def test_devices_that_do_not_fit_the_ranks(platform: SimpleNamespace, tmp_path: Path) -> None:
    platform.cpu = True
    with pytest.raises(EngineError, match=r"names 3 devices \(host:a,.* has 2 ranks"):
        device.of(config(tmp_path, KVCACHED_DEVICE="host:a,host:b,host:c"), 2)
    with pytest.raises(EngineError, match=r"names 2 devices .* has 1 rank "):
        device.of(config(tmp_path, KVCACHED_DEVICE="host:a,host:b"))
    with pytest.raises(EngineError, match="more ranks than others"):
        device.of(config(tmp_path, KVCACHED_DEVICE="host:a,host:b,host:a"), 3)


def test_a_wrong_device_name_never_gets_here(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="KVCACHED_DEVICE"):
        config(tmp_path, KVCACHED_DEVICE="gpu zero")
