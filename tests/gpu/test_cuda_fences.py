"""Fences on a stream that is really busy. Needs a torch with CUDA."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvcached.errors import UnavailableError
from kvcached.ledger import Ledger
from kvcached.units import GIB, MIB
from kvcached.vmm_ops import Arena, Backend, Mapper, cuda_backend

pytestmark = pytest.mark.gpu
PAGE_BYTES, PAGES = 32 * MIB, 8
BUSY_CYCLES = 1_000_000_000  # half a second at 2 GHz
PATIENCE_S = 20.0


class Instance:
    """A mapper on the GPU with four pages mapped, and torch's view of them."""

    def __init__(self, backend: Backend, ledger: Ledger) -> None:
        from kvcached.views import int8_tensor

        size = PAGES * PAGE_BYTES
        self.arena = Arena(backend, [(0, PAGE_BYTES)], PAGES, size, pool_bytes=size)
        self.member = ledger.attach("one", "one")
        self.account = ledger.join("one", "one")
        self.mapper = Mapper(self.arena, self.member.core)
        assert self.account.lease(4 * PAGE_BYTES)
        self.mapper.submit([], [0, 1, 2, 3])
        assert self.mapper.wait([0, 1, 2, 3], PATIENCE_S)
        self.buffer = int8_tensor(self.arena)

    def page(self, number: int) -> Any:
        return self.buffer[number * PAGE_BYTES : (number + 1) * PAGE_BYTES]


@pytest.fixture
def torch() -> Any:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    torch.cuda.init()
    return torch


@pytest.fixture
def one(torch: Any, tmp_path: Path) -> Iterator[Instance]:
    try:
        backend = cuda_backend(0)
    except UnavailableError as error:
        pytest.skip(str(error))
    with Ledger.open(tmp_path / "ledger", "host:fences", GIB) as ledger:
        yield Instance(backend, ledger)


def test_pages_stay_until_the_stream_has_finished(torch: Any, one: Instance) -> None:
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(BUSY_CYCLES)
        one.page(1).fill_(7)  # still to come when the page is given up
    start = time.monotonic()
    one.mapper.submit([1], [], [4], stream.cuda_stream)
    assert time.monotonic() - start < 0.05, "submitting does not wait for the stream"
    one.mapper.wait([4], PATIENCE_S)  # maps go on meanwhile
    assert not stream.query(), "the GPU is still busy: the test tests something"
    assert one.arena.mapped_pages() == [0, 1, 2, 3, 4]
    assert not one.mapper.drain(0.05)
    assert one.arena.is_mapped(1) or stream.query()
    stream.synchronize()  # raises if the kernel has met a page that was gone
    assert one.mapper.drain(PATIENCE_S)
    assert one.arena.mapped_pages() == [0, 2, 3, 4]
    one.mapper.check()
    assert one.member.held() == one.account.charge() == 4 * PAGE_BYTES


def test_a_kept_page_holds_what_the_stream_wrote(torch: Any, one: Instance) -> None:
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(BUSY_CYCLES)
        one.page(2).fill_(5)
    one.mapper.submit([2], [], [], stream.cuda_stream)
    assert one.account.lease(PAGE_BYTES)
    one.mapper.submit([], [2], [], stream.cuda_stream)
    assert one.mapper.wait([2], PATIENCE_S)
    assert not stream.query()
    stream.synchronize()
    assert one.mapper.drain(PATIENCE_S)
    assert one.mapper.counters()["kept"] == 1
    assert int(one.page(2).sum(dtype=torch.int64)) == 5 * PAGE_BYTES
    assert one.member.held() == one.account.charge() == 4 * PAGE_BYTES


def test_work_on_other_streams_is_not_waited_for(torch: Any, one: Instance) -> None:
    busy, idle = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(busy):
        torch.cuda._sleep(BUSY_CYCLES)
    one.mapper.submit([3], [], [], idle.cuda_stream)
    assert one.mapper.drain(0.2)
    assert not busy.query()
    assert not one.arena.is_mapped(3)
    busy.synchronize()
