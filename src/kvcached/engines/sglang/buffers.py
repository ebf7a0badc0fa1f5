"""SGLang's KV cache on an arena.

SGLang addresses slots, one row a token, in tensors of one layer's K or V each. A row may be any
number of bytes from the next, so all layers of a slot can lie together, and a page is one handle;
where attention wants dense rows, every tensor is a region of its own.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvcached.cache import PageMapper
from kvcached.engines.sglang import adapter, device
from kvcached.engines.sglang.build import Build
from kvcached.errors import EngineError
from kvcached.layout import BlockLayout, PageLimits, choose_page
from kvcached.units import ceil_div, format_size, round_up
from kvcached.views import block_view, int8_tensor

logger = logging.getLogger(__name__)

# The smallest page that the granularity allows: the step in which a chosen page size is rounded.
_SMALLEST = PageLimits(1, 1 << 30, 1, 1 << 50)


@dataclass(frozen=True, slots=True)
class KvMemory:
    """The KV cache of one engine: its tensors, and what maps pages under them.

    A block is SGLang's page: ``block_tokens`` slots.
    """

    build: Build
    layout: BlockLayout
    mapper: PageMapper
    block_tokens: int
    block_bytes: int
    buffers: list[torch.Tensor]


def create(
    build: Build,
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    size: int,
    block_tokens: int,
) -> KvMemory:
    """Makes an engine's KV cache: a tensor of ``[size + block_tokens, *shape]`` for each of
    ``shapes``, in that order. Slots 0 to ``block_tokens`` - 1 are SGLang's padding.

    Raises EngineError where SGLang asks for a second one, or for one whose slots are no whole
    blocks.
    """
    if build.memory is not None or not shapes:
        raise EngineError(
            "kvcached: this model has no KV cache or several: not supported with SGLang yet"
        )
    if size % block_tokens:
        raise EngineError(f"kvcached: {size} slots are no whole number of pages of {block_tokens}")
    together = _together(build)
    slots = [math.prod(shape) * dtype.itemsize for shape in shapes]
    runs = [sum(slots) * block_tokens] if together else [each * block_tokens for each in slots]
    layout = _layout(build, runs, size // block_tokens + 1, block_tokens)
    build.meet(layout.num_blocks, layout.blocks_per_page, layout.page_bytes)
    build.measure()  # the model is loaded
    ordinal = device.ordinal(build.arguments, build.number)
    backend = build.device.open_backend(ordinal, build.ledger.lock_fd)
    zero_holes = build.config.unmapped == "zero"
    pinned = layout.page_bytes + (layout.zero_bytes if zero_holes else 0)
    each = build.devices.ranks_each
    member = build.ledger.attach(build.instance, build.name, pinned * each)
    member.describe(sum(runs) * each, block_tokens, layout.page_bytes * each)
    mapper = PageMapper(
        build.ledger,
        member,
        backend,
        layout,
        map_timeout_s=build.config.map_timeout_s,
        zero_holes=zero_holes,
        on_refusal=build.measure,
    )
    arena = int8_tensor(mapper.arena)
    buffers = [
        _rows(arena, layout, dtype, shape, block_tokens, slots, index, together)
        for index, shape in enumerate(shapes)
    ]
    build.memory = KvMemory(build, layout, mapper, block_tokens, sum(runs), buffers)
    logger.info(
        "kvcached: a KV cache of %d slots of %s, %s, in pages of %s",
        size,
        format_size(sum(slots)),
        "all layers of a slot together" if together else "each layer apart",
        format_size(layout.page_bytes),
    )
    return build.memory


def _together(build: Build) -> bool:
    """Whether all layers of a slot lie together: what is wanted, or what attention takes."""
    backend = str(build.arguments["attention_backend"])
    if build.config.layout == "auto":
        return backend in adapter.current().TOGETHER
    return build.config.layout == "block"


def _layout(build: Build, runs: Sequence[int], num_blocks: int, block_tokens: int) -> BlockLayout:
    place = build.device
    blocks_per_page = choose_page(
        runs,
        block_tokens,
        place.granularity,
        place.page_limits,
        num_blocks=num_blocks,
        max_mappings=place.max_mappings,
    )
    if build.config.page_bytes is not None:
        step = choose_page(runs, block_tokens, place.granularity, _SMALLEST)
        blocks_per_page = round_up(ceil_div(build.config.page_bytes, sum(runs)), step)
    return BlockLayout.layer_outermost(num_blocks, runs, blocks_per_page, place.granularity)


def _rows(
    arena: torch.Tensor,
    layout: BlockLayout,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    block_tokens: int,
    slots: Sequence[int],
    index: int,
    together: bool,
) -> torch.Tensor:
    """One tensor ``[slots, *shape]``: its rows in its own region, or inside of every slot."""
    row = (sum(slots) if together else slots[index]) // dtype.itemsize
    inner = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    view = block_view(
        arena,
        layout,
        dtype,
        (block_tokens, *shape),
        region=0 if together else index,
        inner_offset_bytes=sum(slots[:index]) if together else 0,
        strides=[row, *inner],
    )
    return view.flatten(0, 1)  # a view: blocks follow each other as slots do
