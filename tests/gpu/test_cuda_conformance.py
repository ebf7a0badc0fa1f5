"""What only a real GPU can show. The conformance suite itself runs on it with ``-m gpu``."""

from __future__ import annotations

import pytest

from kvcached import vmm_ops
from kvcached.errors import OutOfMemoryError, UnavailableError
from kvcached.units import GIB, MIB

pytestmark = pytest.mark.gpu
PAGE_BYTES = 32 * MIB
NOISE_BYTES = 64 * MIB  # what other users of the GPU may take or give back meanwhile


@pytest.fixture
def backend() -> vmm_ops.Backend:
    try:
        return vmm_ops.cuda_backend(0)
    except UnavailableError as error:
        pytest.skip(str(error))


def test_memory_comes_from_the_device_and_goes_back(backend: vmm_ops.Backend) -> None:
    arena = vmm_ops.Arena(backend, [(0, PAGE_BYTES)], 64, 64 * PAGE_BYTES)
    before = backend.free_bytes()
    arena.map(list(range(32)))
    assert abs(before - backend.free_bytes() - GIB) < NOISE_BYTES
    arena.unmap(list(range(32)))
    assert abs(before - backend.free_bytes()) < NOISE_BYTES


def test_addresses_cost_no_memory(backend: vmm_ops.Backend) -> None:
    before = backend.free_bytes()
    pages = 2 * backend.total_bytes() // PAGE_BYTES
    arena = vmm_ops.Arena(backend, [(0, PAGE_BYTES)], pages, pages * PAGE_BYTES)
    assert arena.size > backend.total_bytes()
    assert abs(before - backend.free_bytes()) < NOISE_BYTES


@pytest.mark.slow
def test_full_device_is_a_shortage_and_rolls_back(backend: vmm_ops.Backend) -> None:
    """Asks for one page more than the whole device has, in one call."""
    size = 512 * MIB
    pages = backend.total_bytes() // size + 2
    arena = vmm_ops.Arena(backend, [(0, size)], pages, pages * size)
    arena.map([0])
    with pytest.raises(OutOfMemoryError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        arena.map(list(range(1, pages)))
    assert arena.mapped_pages() == [0]
    assert arena.created_bytes() == size
    arena.check()
    arena.map([1])


def test_torch_sees_the_same_bytes(backend: vmm_ops.Backend) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    from kvcached.views import int8_tensor

    arena = vmm_ops.Arena(backend, [(0, PAGE_BYTES)], 4, 4 * PAGE_BYTES)
    buffer = int8_tensor(arena)  # nothing is mapped yet
    assert buffer.is_cuda
    arena.map([2])
    part = buffer[2 * PAGE_BYTES : 3 * PAGE_BYTES]
    assert int(part.count_nonzero()) == 0
    part.fill_(5)
    torch.cuda.synchronize()
    assert int(part.sum(dtype=torch.int64)) == 5 * PAGE_BYTES
    arena.unmap([2])
