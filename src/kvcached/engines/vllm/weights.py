"""A model's weights on a GPU that sleeps: they leave the device, and come back where there is room.

vLLM has them in a pool of its own (``CuMemAllocator``), and its sleep mode frees or fills that. The
KV cache is not in it: that lies in the arena, and the scheduler has given its pages back before.
What vLLM allocates beside its KV cache while it makes it (block tables) is in the pool.

Nobody keeps the memory of a model that sleeps. To wake it is set aside in the ledger first, as when
an engine starts: neighbours give back for it what they only cache, and lease nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from vllm.device_allocator import cumem

from kvcached.engines.base import substituted
from kvcached.engines.vllm.room import GpuRoom
from kvcached.engines.vllm.start import GpuStart
from kvcached.errors import OutOfMemoryError

# Where vLLM's ``sleep`` asks for free memory: before 0.26, and since.
_FREE_MEMORY = (
    (torch.cuda, "mem_get_info"),
    (getattr(torch, "accelerator", None), "get_memory_info"),
)


class SleepingWeights:
    """One worker's weights. The worker's thread uses it, from the end of its start.

    ``make_room`` makes a ``GpuRoom`` with the time that waking may take, ``names`` are the engine's
    devices, ``page_bytes`` says what the worker's pages hold.
    """

    def __init__(
        self,
        start: GpuStart,
        device: torch.device,
        make_room: Callable[[], GpuRoom],
        names: Sequence[str],
        page_bytes: Callable[[], int],
    ) -> None:
        self._start = start
        self._device = device
        self._make_room = make_room
        self._names = names
        self._page_bytes = page_bytes
        self._gone: dict[int, int] = {}  # addresses of vLLM's pool without memory, and their sizes
        self._room: GpuRoom | None = None

    @property
    def asleep(self) -> bool:
        """Whether any of it is gone."""
        return bool(self._gone)

    # --- falling asleep

    @contextmanager
    def leaving(self, level: int) -> Iterator[None]:
        """Around vLLM's own ``sleep``. Afterwards neighbours may lease what was freed. Where it
        fails at level 1, everything is as before.
        """
        torch.cuda.synchronize(self._device)
        unmap = cumem.unmap_and_release

        def unmap_and_release(handle: Any) -> None:
            unmap(handle)
            self._gone[handle[2]] = handle[1]

        done = False
        with ExitStack() as stack:
            for module, name in _FREE_MEMORY:
                if asked := getattr(module, name, None):
                    stack.enter_context(substituted(module, **{name: self._own_memory(asked)}))
            stack.enter_context(substituted(cumem, unmap_and_release=unmap_and_release))
            try:
                yield
                done = True
            finally:
                if not done and level == 1 and self._gone:
                    with self._mapping(self._addresses(None)):
                        cumem.CuMemAllocator.get_instance().wake_up(None)
                self._start.measure()

    def _own_memory(self, asked: Callable[..., tuple[int, int]]) -> Callable[..., tuple[int, int]]:
        """What would be free if this process were alone. vLLM asserts that its sleep does not take
        memory; what the whole device has says nothing about that, since a neighbour may grow.
        """

        def own_memory(*args: Any, **kwargs: Any) -> tuple[int, int]:
            total = asked(*args, **kwargs)[1]
            held = torch.cuda.memory_reserved(self._device) - sum(self._gone.values())
            return total - held - self._page_bytes(), total

        return own_memory

    # --- waking

    def needs(self, tags: Sequence[str] | None) -> int:
        """Bytes that waking with these tags (None: all) takes from the device."""
        size = sum(self._gone[address] for address in self._addresses(tags))
        return size + self._start.missing_activations(self._device)

    def make_room(self, tags: Sequence[str] | None) -> None:
        """Waits until there is room, and keeps it for ``coming``.

        Raises OutOfMemoryError after the timeout, with all numbers; then nothing is kept.
        """
        self.leave_room()
        room = self._make_room()
        with ExitStack() as undo:
            undo.enter_context(room)
            with room.in_turn(self._names):
                room.wait_for_room(self.needs(tags))
            undo.pop_all()
        self._room = room

    def leave_room(self) -> None:
        """Gives up the room, where there is some."""
        if self._room is not None:
            self._room.close()
            self._room = None

    @contextmanager
    def coming(self, tags: Sequence[str] | None, runner: Any) -> Iterator[None]:
        """Around vLLM's own ``wake_up``. Where the device refuses memory all the same, what came is
        gone again, and nothing is lost. Afterwards the rest of the room is anybody's.
        """
        if self._room is None and self.asleep:
            self.make_room(tags)
        wanted = self._addresses(tags)
        try:
            with hidden_caches(runner), self._mapping(wanted):
                yield
            self._start.keep_activations(self._device)
            torch.cuda.synchronize(self._device)
        finally:
            self._start.measure()
            self.leave_room()

    def _addresses(self, tags: Sequence[str] | None) -> list[int]:
        pool = cumem.CuMemAllocator.get_instance().pointer_to_data
        here = [address for address in self._gone if address in pool]
        return [address for address in here if tags is None or pool[address].tag in tags]

    @contextmanager
    def _mapping(self, wanted: Sequence[int]) -> Iterator[None]:
        """vLLM's pool maps here only what is gone (it would map the rest twice), and keeps the
        contents in the host's memory until all that is wanted has come.

        What has no contents there reads as zeros, as it did when it was made: a block table's
        unused rows must not name blocks that are not mapped.
        """
        pool = cumem.CuMemAllocator.get_instance().pointer_to_data
        contents = {address: pool[address].cpu_backup_tensor for address in wanted}
        came: list[Any] = []
        map_ = cumem.create_and_map

        def create_and_map(handle: Any) -> None:
            address = handle[2]
            if address not in self._gone:
                return
            try:
                map_(handle)
            except RuntimeError as error:
                raise OutOfMemoryError(
                    f"kvcached: the device refused memory while the engine woke: {error}"
                ) from error
            came.append(handle)
            size = self._gone.pop(address)
            if contents.get(address) is None:
                cumem.libcudart.cudaMemset(address, 0, size)

        try:
            with substituted(cumem, create_and_map=create_and_map):
                yield
        finally:
            if any(address in self._gone for address in wanted):
                for handle in came:
                    cumem.unmap_and_release(handle)
                    self._gone[handle[2]] = handle[1]
                    data = pool[handle[2]]
                    data.cpu_backup_tensor = contents.get(handle[2])
                    if hasattr(data, "is_asleep"):
                        data.is_asleep = True


@contextmanager
def hidden_caches(runner: Any) -> Iterator[None]:
    """While vLLM wakes it sees no KV cache: with fp8 its V1 runner would fill all of it with zeros,
    and most of it has no memory. New pages read as zeros anyway.
    """
    caches, runner.kv_caches = runner.kv_caches, []
    try:
        yield
    finally:
        runner.kv_caches = caches
