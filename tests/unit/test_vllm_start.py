"""Starting on a GPU that others use: what is kept for it, and what it waits for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from kvcached.engines.vllm import room  # noqa: E402
from kvcached.engines.vllm.identity import Identity  # noqa: E402
from kvcached.engines.vllm.start import GpuStart, weight_bytes  # noqa: E402
from kvcached.ledger import Account, Ledger, Member  # noqa: E402

WHO = Identity("b" * 32, "starting", 1)


@dataclass
class Gpu:
    """A device of 110 bytes: what is used beside pages, and the pages."""

    ledger: Ledger
    beside: int = 0
    total: int = 110

    def memory(self) -> tuple[int, int]:
        pages = sum(account.created for account in self.ledger.snapshot().accounts)
        return self.beside + pages, self.total


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "ledger", "host:test", 110, headroom_bytes=10) as opened:
        yield opened


@pytest.fixture
def busy(ledger: Ledger) -> tuple[Account, Member]:
    """A neighbour that holds 60 bytes of pages."""
    account, member = ledger.join("a", "busy"), ledger.attach("a", "busy")
    assert account.lease(60)
    member.created(60)
    return account, member


def test_with_room_it_goes_on_at_once_and_keeps_the_room(
    ledger: Ledger, busy: tuple[Account, Member]
) -> None:
    gpu = Gpu(ledger, beside=5)
    starting = GpuStart(ledger, gpu.memory, WHO)
    starting.wait_for_room(20)
    seen = ledger.snapshot()
    assert (seen.foreign, seen.set_aside, busy[0].leasable()) == (5, 20, 15)


def test_it_waits_for_a_neighbour_to_give_back(
    ledger: Ledger, busy: tuple[Account, Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_ASK_AGAIN_S", 0.002)
    account, member = busy
    starting = GpuStart(ledger, Gpu(ledger).memory, WHO)
    thread = threading.Thread(target=starting.wait_for_room, args=(70,))
    thread.start()
    while account.others_demand() != 30:
        assert thread.is_alive()
        time.sleep(0.001)
    assert not account.lease(1), "it may not take what the other waits for"
    member.released(20)
    thread.join(0.05)
    assert thread.is_alive()
    member.released(10)
    thread.join(5)
    assert not thread.is_alive()


def test_it_does_not_wait_for_what_can_never_be_there(
    ledger: Ledger, busy: tuple[Account, Member]
) -> None:
    ledger.set_guarantee("a", 60)
    starting = GpuStart(ledger, Gpu(ledger, beside=30).memory, WHO)
    starting.wait_for_room(1000)
    assert ledger.snapshot().set_aside == 10, "all that is not guaranteed to somebody"


def test_what_fits_beside_the_ledgers_capacity_is_not_taken_from_it(
    ledger: Ledger, busy: tuple[Account, Member]
) -> None:
    """The ledger governs 110 bytes of a device of 150."""
    starting = GpuStart(ledger, Gpu(ledger, beside=10, total=150).memory, WHO)
    starting.wait_for_room(50)
    seen = ledger.snapshot()
    assert (seen.foreign, seen.set_aside) == (0, 20)


def test_at_the_end_the_model_is_foreign_and_nothing_is_set_aside(
    ledger: Ledger, busy: tuple[Account, Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what vLLM gave back of the activations' memory is taken again, for good."""
    gpu, allocated = Gpu(ledger), {"now": 10, "cached": 4, "peak": 0}

    def empty(size: int, **_: object) -> None:
        allocated["cached"] += size
        gpu.beside += size

    device = torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: allocated["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: allocated["peak"])
    monkeypatch.setattr(
        torch.cuda, "memory_reserved", lambda _: allocated["now"] + allocated["cached"]
    )
    monkeypatch.setattr(torch, "empty", empty)
    starting = GpuStart(ledger, gpu.memory, WHO)
    starting.wait_for_room(30)
    gpu.beside = 14
    with starting.watching_activations(device):
        allocated["peak"] = 19  # nine more than before
    starting.end(device)
    seen = ledger.snapshot()
    assert (seen.foreign, seen.set_aside, allocated["cached"]) == (19, 0, 9)
    assert busy[0].leasable() == 100 - 60 - 19


class Rank(threading.Thread):
    """One rank of a starting engine that needs ``size`` bytes on its device."""

    def __init__(self, ledgers: dict[str, Ledger], instance: str, own: str, size: int) -> None:
        super().__init__(daemon=True)
        self.started = threading.Event()
        self._names, self._size = [*ledgers], size
        self.starting = GpuStart(
            ledgers[own], Gpu(ledgers[own]).memory, Identity(instance * 32, instance, 1)
        )

    def run(self) -> None:
        with self.starting.in_turn(self._names):
            self.starting.wait_for_room(self._size)
        self.started.set()


def test_two_engines_that_start_on_the_same_devices_do_not_get_one_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each device has room for one of them; the ranks come in the worst order."""
    monkeypatch.setattr(room, "_ASK_AGAIN_S", 0.002)
    names = ("host:a", "host:b")
    ledgers = {name: Ledger.open(tmp_path / "ledger", name, 110) for name in names}
    one = [Rank(ledgers, "b", name, 70) for name in names]
    two = [Rank(ledgers, "c", name, 70) for name in names]
    for rank in (one[0], two[1], two[0], one[1]):
        rank.start()
        time.sleep(0.02)
    assert all(rank.started.wait(5) for rank in one)
    assert not any(rank.started.is_set() for rank in two)
    for rank in one:
        rank.starting._member.close()  # the first engine has ended
    assert all(rank.started.wait(5) for rank in two)
    for ledger in ledgers.values():
        ledger.close()


def test_no_rank_starts_before_all_have_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_ASK_AGAIN_S", 0.002)
    names = ("host:a", "host:b")
    ledgers = {name: Ledger.open(tmp_path / "ledger", name, 110) for name in names}
    holder = ledgers["host:b"].join("h", "holder")
    assert holder.lease(60)
    ranks = [Rank(ledgers, "b", name, 70) for name in names]
    for rank in ranks:
        rank.start()
    while holder.others_demand() != 20:
        time.sleep(0.001)
    assert not any(rank.started.is_set() for rank in ranks)
    holder.give_back(20)
    assert all(rank.started.wait(5) for rank in ranks)
    for ledger in ledgers.values():
        ledger.close()


def test_weights_are_what_their_files_take(tmp_path: Path) -> None:
    (tmp_path / "model-00001.safetensors").write_bytes(b"x" * 700)
    (tmp_path / "model-00002.safetensors").write_bytes(b"x" * 300)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 5000)  # the same weights once more
    assert weight_bytes(str(tmp_path), SimpleNamespace(), 2) == 1000


@pytest.mark.parametrize(
    ("shape", "billions"),
    [
        # Llama 3 8B, Llama 3.2 1B, Mixtral 8x7B, as published
        (
            {
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_attention_heads": 32,
                "num_hidden_layers": 32,
                "num_key_value_heads": 8,
                "vocab_size": 128256,
                "head_dim": None,
            },
            8.03,
        ),
        (
            {
                "hidden_size": 2048,
                "intermediate_size": 8192,
                "num_attention_heads": 32,
                "num_hidden_layers": 16,
                "num_key_value_heads": 8,
                "head_dim": 64,
                "vocab_size": 128256,
                "tie_word_embeddings": True,
            },
            1.24,
        ),
        (
            {
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_attention_heads": 32,
                "num_hidden_layers": 32,
                "num_key_value_heads": 8,
                "num_local_experts": 8,
                "vocab_size": 32000,
            },
            46.7,
        ),
    ],
)
def test_without_files_weights_are_estimated_from_the_shape(
    tmp_path: Path, shape: dict[str, object], billions: float
) -> None:
    size = weight_bytes(str(tmp_path), SimpleNamespace(**shape), 2)
    assert size / 2e9 == pytest.approx(billions, rel=0.01)
