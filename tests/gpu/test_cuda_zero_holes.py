"""Holes backed by zeros on a real GPU: what reads see, and what opening costs."""

from __future__ import annotations

import time

import pytest

from kvcached import vmm_ops
from kvcached.errors import UnavailableError
from kvcached.units import GIB, MIB

pytestmark = pytest.mark.gpu


@pytest.fixture
def backend() -> vmm_ops.Backend:
    try:
        return vmm_ops.cuda_backend(0)
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("regions", "chunk", "limit_s"),
    [(1, 32 * MIB, 2.0), (64, 2 * MIB, 10.0)],
    ids=["block", "layer"],
)
def test_64_gib_of_addresses_read_as_zeros(
    backend: vmm_ops.Backend,
    regions: int,
    chunk: int,
    limit_s: float,
    record_property: pytest.FixtureRequest,
) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    from kvcached.views import int8_tensor

    pages = 64 * GIB // regions // chunk
    places = [(index * pages * chunk, chunk) for index in range(regions)]
    before = backend.free_bytes()
    start = time.monotonic()
    arena = vmm_ops.Arena(backend, places, pages, 64 * GIB, zero_holes=True)
    opened_s = time.monotonic() - start
    print(f"\nzeros under 64 GiB in {regions} regions of {chunk >> 20} MiB: {opened_s:.3f} s")
    record_property("opened_s", opened_s)  # type: ignore[operator]
    assert opened_s < limit_s
    assert arena.zero_bytes() == chunk
    assert before - backend.free_bytes() < 512 * MIB
    buffer = int8_tensor(arena)
    sample = buffer[:: 16 * 1024 * 1024 + 4096]
    assert int(sample.count_nonzero()) == 0
    arena.map([1, 3])
    place = buffer[chunk : 2 * chunk]
    assert int(place.count_nonzero()) == 0
    place.fill_(7)
    torch.cuda.synchronize()
    assert int(buffer[: 4 * chunk].sum(dtype=torch.int64)) == 7 * chunk
    arena.unmap([1, 3])
    assert int(place.count_nonzero()) == 0
    start = time.monotonic()
    del place, sample, buffer, arena
    print(f"and closed in {time.monotonic() - start:.3f} s")
