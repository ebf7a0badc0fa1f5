"""What vLLM's KV-cache configuration means in blocks, pages and bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kvcached.engines.vllm.device import Device
from kvcached.errors import EngineError
from kvcached.layout import BlockLayout, PageLimits, choose_page
from kvcached.snapshot import AccountSnapshot
from kvcached.units import ceil_div, round_up

# The smallest page that the granularity allows: the step in which a chosen page size is rounded.
_SMALLEST = PageLimits(1, 1 << 30, 1, 1 << 50)
# How many of the last tokens a layer of a kind needs; None: all of them.
_WINDOWS: dict[str, str | None] = {
    "FullAttentionSpec": None,
    "MLAAttentionSpec": None,
    "SlidingWindowSpec": "sliding_window",
    "SlidingWindowMLASpec": "sliding_window",
    "ChunkedLocalAttentionSpec": "attention_chunk_size",
}


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that share block tables: every token has a slot in a block of each group."""

    block_tokens: int
    window_tokens: int | None
    """What it keeps at least of a long sequence; None: all of it."""

    def least_blocks(self, tokens: int) -> int:
        """Blocks that a sequence of so many tokens cannot do without."""
        kept = tokens if self.window_tokens is None else min(tokens, self.window_tokens)
        return ceil_div(kept, self.block_tokens)


@dataclass(frozen=True, slots=True)
class Geometry:
    """Blocks of one engine as they lie in memory. All groups draw on the same block ids."""

    num_blocks: int
    block_bytes: int  # all layers, K and V
    blocks_per_page: int
    groups: tuple[Group, ...]

    @property
    def page_bytes(self) -> int:
        return self.block_bytes * self.blocks_per_page

    @property
    def paged_blocks(self) -> int:
        """The blocks of whole pages, at least one more than there are: a tensor that begins within
        a block ends within the one after its last. It costs addresses only.
        """
        return round_up(self.num_blocks + 1, self.blocks_per_page)

    @property
    def block_tokens(self) -> int:
        """Tokens for which a sequence needs at least one block more: those of the smallest blocks
        that keep all of it, if any do.
        """
        whole = [group.block_tokens for group in self.groups if group.window_tokens is None]
        return min(whole or [group.block_tokens for group in self.groups])

    @property
    def blocks_grown(self) -> int:
        """The most blocks that a sequence takes every ``block_tokens`` tokens."""
        return sum(group.block_tokens <= self.block_tokens for group in self.groups)

    def least_blocks(self, tokens: int) -> int:
        """Blocks that a sequence of so many tokens cannot do without, over all groups."""
        blocks = 0
        for group in self.groups:  # asked for each request: a sum over a generator takes twice that
            blocks += group.least_blocks(tokens)
        return blocks

    def layout(self, runs: Sequence[int], granularity_bytes: int) -> BlockLayout:
        """The layout: a region for each run of blocks, and a handle a page in each of them."""
        return BlockLayout.layer_outermost(
            self.paged_blocks, runs, self.blocks_per_page, granularity_bytes
        )


def of(cache_config: Any, runs: Sequence[int], device: Device, page_bytes: int | None) -> Geometry:
    """The geometry of a ``KVCacheConfig`` whose blocks take so many bytes in each run.

    The worker computes it, who knows the attention backends; the scheduler finds it in the ledger
    (``described``). Raises EngineError where the KV cache is of a kind that is not supported.
    """
    groups = groups_of(cache_config)
    if not groups or not sum(runs):
        raise EngineError("kvcached: this model has no KV cache; run it without kvcached")
    block_tokens = min(group.block_tokens for group in groups)
    blocks_per_page = choose_page(
        runs,
        block_tokens,
        device.granularity,
        device.page_limits,
        num_blocks=cache_config.num_blocks,
        max_mappings=device.max_mappings,
    )
    if page_bytes is not None:
        step = choose_page(runs, block_tokens, device.granularity, _SMALLEST)
        blocks_per_page = round_up(ceil_div(page_bytes, sum(runs)), step)
    return Geometry(cache_config.num_blocks, sum(runs), blocks_per_page, groups)


def described(
    cache_config: Any, block_bytes: int, ranks: int, account: AccountSnapshot | None
) -> Geometry:
    """The geometry that workers, ``ranks`` of them on the device, have told its ledger.

    Raises EngineError where none has, or where their blocks are not of ``block_bytes`` each.
    """
    said = account.block_bytes // ranks if account is not None else 0
    if account is None or said != block_bytes:
        raise EngineError(
            f"kvcached: the scheduler's blocks have {block_bytes} bytes, its workers' {said}"
        )
    per_page = account.page_bytes // account.block_bytes
    return Geometry(cache_config.num_blocks, block_bytes, per_page, groups_of(cache_config))


def groups_of(cache_config: Any) -> tuple[Group, ...]:
    """The groups of a ``KVCacheConfig``. Raises EngineError for a kind that is not supported."""
    groups = []
    for group in cache_config.kv_cache_groups:
        specs = list(layer_specs(group.kv_cache_spec))
        wrong = {type(spec).__name__ for spec in specs} - _WINDOWS.keys()
        if wrong:
            raise EngineError(
                f"kvcached does not support KV caches of kind {', '.join(sorted(wrong))} yet "
                f"(supported: {', '.join(sorted(_WINDOWS))})"
            )
        windows = {_window(spec) for spec in specs}
        window = None if None in windows else max(w for w in windows if w is not None)
        groups.append(Group(int(group.kv_cache_spec.block_size), window))
    return tuple(groups)


def layer_specs(spec: Any) -> Iterator[Any]:
    """The specifications of single layers in one of a group."""
    several = getattr(spec, "kv_cache_specs", None)
    if several is None:
        yield spec
    else:
        yield from several.values()


def _window(spec: Any) -> int | None:
    kind = type(spec).__name__
    field = _WINDOWS[kind]
    if field is None:
        return None
    # At the start of a chunk a single token is all that chunked attention needs.
    return 1 if kind == "ChunkedLocalAttentionSpec" else int(getattr(spec, field))
