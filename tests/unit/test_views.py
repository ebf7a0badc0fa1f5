"""Views over an arena agree with the layout's arithmetic, byte for byte."""

from __future__ import annotations

import subprocess
import sys
import weakref

import pytest

from kvcached import vmm_ops
from kvcached.errors import InvalidArgumentError
from kvcached.layout import BlockId, BlockLayout

torch = pytest.importorskip("torch")

from kvcached.views import block_view, int8_tensor  # noqa: E402  (needs torch to be of use)


def open_arena(layout: BlockLayout) -> vmm_ops.Arena:
    backend = vmm_ops.host_backend("views")
    return vmm_ops.Arena(backend, layout.arena_regions(), layout.num_pages, layout.size_bytes)


def test_tensor_over_holes_needs_no_memory() -> None:
    layout = BlockLayout.block_outermost(1024, 1 << 20, 16, 4096)
    arena = open_arena(layout)
    buffer = int8_tensor(arena)
    assert buffer.shape == (1 << 30,)
    assert buffer.dtype == torch.int8
    assert buffer.data_ptr() == arena.address
    assert arena.created_bytes() == 0
    tail = int8_tensor(arena, 8192)
    assert tail.data_ptr() == arena.address + 8192
    assert tail.numel() == (1 << 30) - 8192


def test_tensor_keeps_the_arena_alive() -> None:
    layout = BlockLayout.block_outermost(4, 4096, 1, 4096)
    arena = open_arena(layout)
    arena.map([0])
    view = int8_tensor(arena, 0, 4096)[100:200]
    del arena
    view.fill_(7)
    assert int(view.sum()) == 700


def test_capsule_that_nobody_takes_lets_the_arena_go() -> None:
    backend = vmm_ops.host_backend("views")
    arena = vmm_ops.Arena(backend, [(0, 4096)], 1, 4096)
    capsule = arena.tensor(0, 4096)
    del arena
    assert backend.live_reservations() == 1
    del capsule
    assert backend.live_reservations() == 0
    arena = vmm_ops.Arena(backend, [(0, 4096)], 1, 4096)
    tensor = torch.utils.dlpack.from_dlpack(arena.tensor(0, 4096))
    alive = weakref.ref(tensor)
    del arena
    assert backend.live_reservations() == 1
    del tensor
    assert alive() is None
    assert backend.live_reservations() == 0


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 0), (0, 8193), (8192, 1), (1 << 60, 1)])
def test_ranges_outside_the_arena_are_refused(offset: int, nbytes: int) -> None:
    arena = open_arena(BlockLayout.block_outermost(2, 4096, 1, 4096))
    with pytest.raises(InvalidArgumentError, match="do not lie inside"):
        int8_tensor(arena, offset, nbytes)
    with pytest.raises(InvalidArgumentError, match="do not lie inside"):
        arena.tensor(offset, nbytes)


def test_block_outermost_views_agree_with_byte_offsets() -> None:
    """[blocks, K/V, heads, tokens, head] of float16 in each of three layers of a block."""
    shape, layers = (2, 2, 4, 8), 3
    layer_bytes = 2 * 2 * 4 * 8 * 2
    layout = BlockLayout.block_outermost(40, layers * layer_bytes, 32, 4096, 1024)
    arena = open_arena(layout)
    arena.map(list(range(layout.num_pages)))
    buffer = int8_tensor(arena)
    views = [
        block_view(buffer, layout, torch.float16, shape, inner_offset_bytes=layer * layer_bytes)
        for layer in range(layers)
    ]
    for layer, view in enumerate(views):
        for block in range(layout.num_blocks):
            view[block].fill_(100 * layer + block)
    for layer in range(layers):
        for block in range(layout.num_blocks):
            start = layout.byte_range(BlockId(block)).start + layer * layer_bytes
            part = buffer[start : start + layer_bytes].view(torch.float16)
            assert part.unique().tolist() == [100 * layer + block]
    assert views[1].data_ptr() == arena.address + layer_bytes


def test_layer_outermost_views_agree_with_byte_offsets() -> None:
    layout = BlockLayout.layer_outermost(30, [512, 512, 256], 16, 4096)
    arena = open_arena(layout)
    arena.map(list(range(layout.num_pages)))
    buffer = int8_tensor(arena)
    for region, place in enumerate(layout.regions):
        view = block_view(buffer, layout, torch.float32, (place.block_bytes // 4,), region=region)
        for block in range(layout.num_blocks):
            view[block].fill_(1000 * region + block)
    for region in range(len(layout.regions)):
        for block in map(BlockId, range(layout.num_blocks)):
            covered = layout.byte_range(block, region)
            part = buffer[covered.start : covered.stop].view(torch.float32)
            assert part.unique().tolist() == [1000 * region + block]


def test_inner_strides_are_taken() -> None:
    layout = BlockLayout.block_outermost(4, 4096, 1, 4096)
    arena = open_arena(layout)
    arena.map([2])
    buffer = int8_tensor(arena)
    heads_first = block_view(buffer, layout, torch.int16, (4, 8), strides=(1, 4))
    heads_first[2, 3, 5] = 77
    assert buffer.view(torch.int16)[2 * 2048 + 5 * 4 + 3] == 77


def test_views_that_leave_the_block_are_refused() -> None:
    layout = BlockLayout.block_outermost(4, 4096, 1, 4096)
    buffer = int8_tensor(open_arena(layout))
    with pytest.raises(InvalidArgumentError, match="leave a block"):
        block_view(buffer, layout, torch.float32, (1025,))
    with pytest.raises(InvalidArgumentError, match="leave a block"):
        block_view(buffer, layout, torch.float32, (1024,), inner_offset_bytes=4)
    with pytest.raises(InvalidArgumentError, match="multiples of 4 bytes"):
        block_view(buffer, layout, torch.float32, (4,), inner_offset_bytes=2)
    with pytest.raises(InvalidArgumentError, match="do not belong"):
        block_view(buffer, layout, torch.float32, (4, 4), strides=(4,))
    with pytest.raises(InvalidArgumentError, match="do not belong"):
        block_view(buffer, layout, torch.float32, (4, 0))


def test_importing_the_core_touches_neither_cuda_nor_torch() -> None:
    program = (
        "import sys, kvcached.vmm_ops, kvcached.layout, kvcached.views\n"
        "maps = open('/proc/self/maps').read()\n"
        "assert 'libcuda' not in maps and 'torch' not in maps, maps\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)
