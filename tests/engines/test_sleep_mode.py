"""vLLM's sleep mode on its own classes for GPUs: the worker, its pool of weights, the executor, the
engine's core. The CUDA calls below them are played: memory is a dictionary of addresses.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # at import, of others
    from vllm.device_allocator import AllocationData, cumem
    from vllm.v1.worker import gpu_worker

    from kvcached.engines.vllm import room as room_module
    from kvcached.engines.vllm.identity import Identity
    from kvcached.engines.vllm.room import GpuRoom
    from kvcached.engines.vllm.start import GpuStart
    from kvcached.engines.vllm.weights import SleepingWeights
    from kvcached.engines.vllm.worker import ElasticWorker
    from kvcached.errors import EngineError, OutOfMemoryError
    from kvcached.ledger import Account, Ledger, Member

WHO = Identity("b" * 32, "sleeper", 1)
KIB = 1 << 10
DEVICE = torch.device("cpu")
WEIGHTS = {0x1000: 30 * KIB, 0x2000: 10 * KIB}
TABLES = {0x3000: 2 * KIB}
SIZE = sum(WEIGHTS.values()) + sum(TABLES.values())
TOTAL = 110 * KIB


@dataclass
class Gpu:
    """A device: what vLLM's pool has mapped, what others took, and everybody's pages."""

    ledger: Ledger
    mapped: dict[int, bytearray] = field(default_factory=dict)
    others: int = 0
    reserved: int = 0  # by torch, the pool's addresses included
    refuses: set[int] = field(default_factory=set)

    def memory(self) -> tuple[int, int]:
        used = sum(map(len, self.mapped.values())) + self.others
        return used + self.ledger.created(), TOTAL

    def free(self, *_: object) -> tuple[int, int]:
        used, total = self.memory()
        return total - used, total

    def map(self, handle: Any) -> None:
        _, size, address, _ = handle
        assert address not in self.mapped, "mapped twice"
        if address in self.refuses or self.free()[0] < size:
            raise RuntimeError("CUDA Error: out of memory")
        self.mapped[address] = bytearray(b"?" * size)

    def unmap(self, handle: Any) -> None:
        del self.mapped[handle[2]]

    def copy(self, to: int, from_: int, size: int) -> None:
        import ctypes

        if from_ in self.mapped:
            ctypes.memmove(to, bytes(self.mapped[from_]), size)
        else:
            self.mapped[to][:] = ctypes.string_at(from_, size)

    def set(self, address: int, value: int, size: int) -> None:
        self.mapped[address][:size] = bytes([value]) * size


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "ledger", "host:test", TOTAL, headroom_bytes=10 * KIB) as opened:
        yield opened


@pytest.fixture
def gpu(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu(ledger, reserved=SIZE)
    pool = cumem.CuMemAllocator()
    for tag, sizes in (("weights", WEIGHTS), ("kv_cache", TABLES)):
        for address, size in sizes.items():
            pool.pointer_to_data[address] = AllocationData((0, size, address, 0), tag)
            made.mapped[address] = bytearray(bytes([address >> 12]) * size)
    monkeypatch.setattr(cumem.CuMemAllocator, "instance", pool)
    monkeypatch.setattr(cumem, "cumem_available", True)
    monkeypatch.setattr(cumem, "create_and_map", made.map)
    monkeypatch.setattr(cumem, "unmap_and_release", made.unmap)
    monkeypatch.setattr(
        cumem, "libcudart", SimpleNamespace(cudaMemcpy=made.copy, cudaMemset=made.set)
    )
    from vllm import device_allocator

    if hasattr(device_allocator, "get_mem_allocator_instance"):
        for module in (device_allocator, gpu_worker):
            monkeypatch.setattr(module, "get_mem_allocator_instance", lambda: pool, raising=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", made.free)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: made.reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: made.reserved)
    for name, value in (
        ("get_memory_info", made.free),
        ("synchronize", lambda *_: None),
        ("empty_cache", lambda *_: None),
    ):
        monkeypatch.setattr(torch.accelerator, name, value, raising=False)
    return made


class Runner:
    """vLLM's V1 runner, as far as waking goes; with ``kv_caches`` that nobody may touch."""

    def __init__(self) -> None:
        self.kv_caches = [SimpleNamespace(zero_=self.touched)]
        self.model = torch.nn.Linear(2, 2)
        self.model.register_buffer("scale", torch.ones(1))
        self.woken = 0

    def touched(self) -> None:
        raise AssertionError("the KV cache was filled with zeros")

    def post_kv_cache_wake_up(self) -> None:
        self.woken += 1
        for cache in self.kv_caches:
            cache.zero_()


class Worker(ElasticWorker, gpu_worker.Worker):  # type: ignore[misc]
    """Our worker over vLLM's, as in an engine; started, and without the rest of its parts."""

    def __init__(self, gpu: Gpu, timeout_s: float = 5.0, who: Identity = WHO) -> None:
        self.model_runner = Runner()
        # What vLLM's constructor makes, of all versions.
        self._sleep_saved_buffers = {}
        self._sleep_saved_draft_buffers = self._sleep_saved_parameters = {}
        self._sleep_rebuild_draft_metadata_buffers = False
        self._sleep_mode_backend = None
        self.model_config = SimpleNamespace(
            enable_nccl_comm_suspend=False,
            sleep_preserve_parameter_names=(),
            sleep_mode_backend="cumem",
        )
        self.vllm_config = SimpleNamespace(model_config=self.model_config)
        self.mapper = SimpleNamespace(drain=lambda _: True)  # type: ignore[assignment]
        started = GpuStart(gpu.ledger, gpu.memory, who)
        started.close()
        self._weights = SleepingWeights(
            started,
            DEVICE,
            lambda: GpuRoom(gpu.ledger, gpu.memory, who, "waking", timeout_s),
            [gpu.ledger.device],
            lambda: 0,
        )

    def get_draft_model(self) -> None:
        return None

    def synchronize_device(self) -> None:
        return None


def contents(gpu: Gpu) -> dict[int, int]:
    """What the first byte of each mapped allocation says; all of its bytes say the same."""
    assert all(len(set(data)) == 1 for data in gpu.mapped.values())
    return {address: data[0] for address, data in gpu.mapped.items()}


@pytest.fixture
def neighbour(ledger: Ledger) -> tuple[Account, Member]:
    return ledger.join("a" * 32, "neighbour"), ledger.attach("a" * 32, "neighbour")


def grow(neighbour: tuple[Account, Member], size: int) -> bool:
    account, member = neighbour
    granted = account.lease(size)
    if granted:
        member.created(size)
    return granted


def test_level_1_frees_the_memory_for_neighbours_and_brings_all_of_it_back(
    gpu: Gpu, neighbour: tuple[Account, Member]
) -> None:
    worker, before = Worker(gpu), contents(gpu)
    assert not grow(neighbour, 80 * KIB)
    worker.sleep(1)
    assert gpu.mapped == {}
    assert gpu.ledger.snapshot().foreign == 0
    assert grow(neighbour, 40 * KIB)
    worker.wake_up()
    assert contents(gpu) == {**before, 0x3000: 0}, "a table that was dropped reads as zeros"
    seen = gpu.ledger.snapshot()
    assert (seen.foreign, seen.set_aside) == (SIZE, 0)
    calls = gpu_worker.Worker.wake_up.__code__.co_names
    assert worker.model_runner.woken == ("post_kv_cache_wake_up" in calls)
    assert len(worker.model_runner.kv_caches) == 1, "hidden only while vLLM woke"


def test_level_2_keeps_no_weights_and_all_buffers(gpu: Gpu) -> None:
    worker = Worker(gpu)
    worker.sleep(2)
    assert gpu.mapped == {}
    worker.model_runner.model.scale.zero_()
    worker.wake_up(["weights"])
    assert contents(gpu) == dict.fromkeys(WEIGHTS, 0)
    assert worker.model_runner.model.scale.item() == 1.0
    assert worker._weights is not None
    assert worker._weights.asleep
    worker.wake_up(["kv_cache"])
    assert contents(gpu) == dict.fromkeys((*WEIGHTS, *TABLES), 0)
    assert not worker._weights.asleep


def test_a_neighbour_that_grows_meanwhile_is_no_reason_to_fail(
    gpu: Gpu, neighbour: tuple[Account, Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM compares what is free before and after."""
    worker, unmap = Worker(gpu), gpu.unmap

    def unmap_and_grow(handle: Any) -> None:
        unmap(handle)
        gpu.others += 2 * handle[1]

    monkeypatch.setattr(cumem, "unmap_and_release", unmap_and_grow)
    free = gpu.free()[0]
    worker.sleep(1)
    assert gpu.free()[0] < free


def test_what_this_process_takes_meanwhile_is(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """The assertion keeps its sense; and the engine is as before."""
    worker, unmap, before = Worker(gpu), gpu.unmap, contents(gpu)

    def unmap_and_take(handle: Any) -> None:
        unmap(handle)
        gpu.reserved += 2 * handle[1]

    monkeypatch.setattr(cumem, "unmap_and_release", unmap_and_take)
    with pytest.raises(AssertionError, match="Memory usage increased"):
        worker.sleep(1)
    monkeypatch.setattr(cumem, "unmap_and_release", unmap)
    assert worker._weights is not None
    assert not worker._weights.asleep
    assert contents(gpu) == {**before, 0x3000: 0}


def test_waking_waits_for_what_a_neighbour_only_caches(
    gpu: Gpu, neighbour: tuple[Account, Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room_module, "_ASK_AGAIN_S", 0.002)
    worker, before = Worker(gpu), contents(gpu)
    worker.sleep(1)
    assert grow(neighbour, 100 * KIB), "all that there is"
    thread = threading.Thread(target=worker.wake_up)
    thread.start()
    account, member = neighbour
    while account.others_demand() != SIZE:
        assert thread.is_alive()
        time.sleep(0.001)
    assert gpu.mapped == {}, "nothing is mapped before there is room"
    member.released(SIZE - KIB)
    assert not account.lease(KIB), "it may not take what the other waits for"
    member.released(KIB)
    thread.join(5)
    assert contents(gpu) == {**before, 0x3000: 0}
    assert not account.lease(KIB)


def test_what_does_not_come_free_in_time_leaves_it_asleep(
    gpu: Gpu, neighbour: tuple[Account, Member]
) -> None:
    worker, before = Worker(gpu, timeout_s=0.1), contents(gpu)
    worker.sleep(1)
    assert grow(neighbour, 80 * KIB)
    said = worker.make_room()
    assert said is not None
    for part in (
        f"{SIZE // KIB} KiB for waking",
        "within 0.1 s",
        "30 KiB are free",
        "neighbour 80",
    ):
        assert part in said, said
    with pytest.raises(OutOfMemoryError):
        worker.wake_up()
    assert gpu.mapped == {}
    assert gpu.ledger.snapshot().set_aside == 0
    assert neighbour[0].lease(20 * KIB), "what it did not get is the neighbour's"
    neighbour[0].give_back(20 * KIB)
    neighbour[1].released(60 * KIB)
    worker.wake_up()
    assert contents(gpu) == {**before, 0x3000: 0}


def test_a_device_that_refuses_on_the_way_loses_nothing(gpu: Gpu) -> None:
    worker, before = Worker(gpu), contents(gpu)
    worker.sleep(1)
    gpu.refuses = {0x2000}
    with pytest.raises(OutOfMemoryError, match="refused memory"):
        worker.wake_up()
    assert gpu.mapped == {}
    assert gpu.ledger.snapshot().foreign == 0
    gpu.refuses = set()
    worker.wake_up()
    assert contents(gpu) == {**before, 0x3000: 0}


def test_waking_everything_after_a_part_maps_nothing_twice(gpu: Gpu) -> None:
    worker, before = Worker(gpu), contents(gpu)
    worker.sleep(1)
    worker.wake_up(["weights"])
    worker.wake_up()
    assert contents(gpu) == {**before, 0x3000: 0}


def test_no_step_runs_without_weights(gpu: Gpu) -> None:
    worker = Worker(gpu)
    worker.sleep(1)
    worker.sleep(2)  # is asleep already: its weights stay in the host's memory
    with pytest.raises(EngineError, match="asleep"):
        worker.execute_model(SimpleNamespace())
    worker.wake_up()
    assert 0x1 in contents(gpu).values()


def test_two_that_wake_at_once_do_not_take_more_than_there_is(
    gpu: Gpu, neighbour: tuple[Account, Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for one: it gets it, and the other one when that sleeps again."""
    monkeypatch.setattr(room_module, "_ASK_AGAIN_S", 0.002)
    whos = [Identity(letter * 32, letter, 1) for letter in "cd"]
    taken: list[Identity] = []

    def wake(who: Identity) -> None:
        with GpuRoom(gpu.ledger, gpu.memory, who, "waking", 5.0) as room:
            room.wait_for_room(SIZE)
            gpu.others += SIZE
            taken.append(who)

    gpu.mapped.clear()
    assert grow(neighbour, 50 * KIB)
    threads = [threading.Thread(target=wake, args=(who,)) for who in whos]
    for thread in threads:
        thread.start()
    while not taken:
        time.sleep(0.001)
    time.sleep(0.1)
    assert len(taken) == 1
    gpu.others -= SIZE
    for thread in threads:
        thread.join(5)
    assert len(taken) == 2
