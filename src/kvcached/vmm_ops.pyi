from collections.abc import Sequence
from typing import Any, Literal

# --- arena: backends, reservations and mappings ---

_Operation = Literal[
    "reserve",
    "free_reservation",
    "create",
    "map",
    "access",
    "unmap",
    "release",
    "record_fence",
    "fence_done",
]

class Backend:
    """A device's virtual memory. Any thread may use it; a forked child may not."""

    @property
    def kind(self) -> Literal["host", "cuda"]: ...
    @property
    def granularity(self) -> int:
        """Bytes that every size and offset is a multiple of."""

    def free_bytes(self) -> int:
        """What the device has left (host: within this process's cgroup limits)."""

    def total_bytes(self) -> int: ...
    def live_handles(self) -> int: ...
    def live_reservations(self) -> int: ...
    def live_fences(self) -> int: ...
    def created_bytes(self) -> int:
        """Bytes of all live handles, over all arenas of this backend."""

    def calls(self) -> int:
        """Driver calls so far, failed ones included."""

    def inject(
        self,
        nth: int,
        code: Literal["out_of_memory", "driver"] = "out_of_memory",
        operation: _Operation | None = None,
        times: int = 1,
    ) -> None:
        """For tests: refuse the nth call from now (of one operation, or of all), `times` in a row.

        "access" is the second half of a map: the memory is placed, but cannot be made accessible.
        """

    def inject_off(self) -> None: ...
    def hold_fences(self, hold: bool = True) -> None:
        """For tests: fences recorded from now on are not done before they are let pass."""

    def pass_fences(self, count: int = ...) -> None:
        """For tests: lets so many held fences pass, the oldest first; all if not given."""

def host_backend(name: str, min_fd: int = -1) -> Backend:
    """Host memory: a memfd named ``kvcached:<name>``, its descriptor numbered above ``min_fd``.

    The memfd is opened when the first page is created. Raises InvalidArgumentError for a name
    that is empty or longer than 200 bytes.
    """

def host_memory_info(proc: str = "/proc", cgroup: str = "/sys/fs/cgroup") -> tuple[int, int]:
    """Free and total bytes that this process may use: the machine's, cut by its cgroups' limits.

    File cache that gives way by itself counts as free. Raises UnavailableError where the kernel
    does not say.
    """

def cuda_backend(ordinal: int) -> Backend:
    """The GPU that this process sees under ``ordinal``. The driver is opened here, not at import.

    Raises UnavailableError, with the reason, where there is no driver, no such device or no
    virtual memory management.
    """

def time_bare_pages(
    backend: Backend, page_bytes: int, rounds: int, keep: bool
) -> tuple[list[float], list[float]]:
    """For benchmarks: microseconds that a page takes in and out, with the backend's calls alone.

    ``keep``: one handle all the time; otherwise each round creates and releases it.
    """

class Span:
    """Bytes of an arena, for any framework's ``from_dlpack()``: a one-dimensional int8 tensor."""

    @property
    def offset(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def __dlpack__(self, **kwargs: object) -> object: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

class Arena:
    """One reservation of ``size`` bytes, and the pages that are mapped into it.

    Page p covers the bytes ``[offset + p*chunk, offset + (p+1)*chunk)`` of every region
    ``(offset, chunk)``; each of them is one handle. Any thread may call any method; the GIL is
    released while it waits or works. Tensors over the arena keep it alive.
    """

    def __init__(
        self,
        backend: Backend,
        regions: Sequence[tuple[int, int]],
        pages: int,
        size: int,
        pool_bytes: int = 0,
        zero_holes: bool = False,
    ) -> None:
        """``pool_bytes``: how much memory of unmapped pages is kept for reuse (with its contents).

        ``zero_holes``: places without a page are backed by shared zeros, one handle for each size
        of chunk; what is written there is read at all of them. Opening then maps every place, and
        raises OutOfMemoryError or DriverError where the device refuses. While a page replaces the
        zeros, or they the page, a GPU has nothing mapped there for a moment.

        Raises InvalidArgumentError for regions that overlap, do not fit, or are not multiples of
        the granularity.
        """

    def map(self, pages: Sequence[int]) -> int:
        """Map all of these pages or none; returns the change of ``created_bytes()``.

        New pages read as zeros, those from the pool hold old data. Raises OutOfMemoryError or
        DriverError (then ``created_bytes()`` says what exists), InvalidArgumentError for a page
        that is mapped already, out of range or named twice (then nothing has changed).
        """

    def unmap(self, pages: Sequence[int]) -> int:
        """Unmap all of these pages; returns the bytes that really went back to the device.

        What the driver refuses to unmap or release goes into quarantine: it stays in
        ``created_bytes()`` and is tried again at every later call. Raises InvalidArgumentError
        for a page that is not mapped, out of range or named twice (then nothing has changed).
        """

    def trim(self, keep_bytes: int = 0) -> int:
        """Release pooled handles beyond ``keep_bytes``; returns the bytes that went back."""

    def retry_quarantine(self) -> int:
        """Try again to give back what is in quarantine; returns the bytes that went back."""

    def uncover(self) -> int:
        """Take the zeros out of the holes for good; returns the bytes that went back.

        Nothing may read there any more. Raises DriverError where the driver keeps some.
        """

    def is_mapped(self, page: int) -> bool: ...
    def mapped_pages(self) -> list[int]:
        """The mapped pages, ascending."""

    def mapped_bytes(self) -> int: ...
    def created_bytes(self) -> int:
        """Bytes that occupy the device for this arena: mapped, pooled, in quarantine and zeros."""

    def pooled_bytes(self) -> int: ...
    def quarantined_bytes(self) -> int: ...
    def zero_bytes(self) -> int:
        """Bytes of the shared zeros that back holes; 0 where holes are holes."""

    def bare_places(self) -> int:
        """Places without a page that lack their zeros too, because the driver refused them."""

    def counters(self) -> dict[str, int]:
        """maps, unmaps, creates, releases (in handles) and failures (refusals of the driver)."""

    def last_failure(self) -> str:
        """The driver's last refusal in words; empty if there was none."""

    def check(self) -> None:
        """Add everything up; raises DriverError where the sums differ."""

    @property
    def address(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def pages(self) -> int: ...
    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all regions."""

    def tensor(self, offset: int, nbytes: int) -> object:
        """A DLPack capsule ("dltensor") of these bytes as int8; they need not be mapped yet."""

    def span(self, offset: int, nbytes: int) -> Span:
        """The same bytes as an object with ``__dlpack__``, for ``torch.from_dlpack``."""

# --- blocks ---

class Blocks:
    """Which blocks are free, cached or in use, and on which pages. One thread: the scheduler's."""

    def __init__(
        self, num_blocks: int, blocks_per_page: int, reserve_block0: bool = True
    ) -> None: ...
    def alloc(self, count: int) -> list[int] | None:
        """``count`` block ids, or None where fewer are available; cached ones last, oldest first.

        Raises InvalidArgumentError for a count that can never be served.
        """

    def free(self, ids: Sequence[int], cached: bool = False) -> None:
        """Ends the use of blocks. Raises InvalidArgumentError naming the first wrong id; then
        nothing has changed. The same for ``touch``.
        """

    def touch(self, ids: Sequence[int]) -> None:
        """Takes cached blocks back into use."""

    def uncache(self, count: int) -> list[int]:
        """Up to ``count`` of the oldest cached blocks become free; returns their ids."""

    def uncache_all(self) -> None: ...
    def grow(self, count: int) -> list[int]:
        """Makes up to ``count`` of the lowest absent pages present; returns their ids."""

    def add_page(self, page: int) -> None: ...
    def shrink(self, count: int) -> list[int]:
        """Gives up to ``count`` empty pages, highest first, never page 0."""

    def reclaim(self, count: int) -> tuple[list[int], list[int]]:
        """Gives up to ``count`` unused cached pages, longest unused first; returns the pages and
        the blocks whose contents are lost.
        """

    def set_bound(self, blocks: int | None) -> None:
        """No more than so many blocks are handed out; what is in use above that stays."""

    def available(self) -> int:
        """Free and cached blocks."""

    def is_present(self, page: int) -> bool: ...
    def used_in(self, page: int) -> int:
        """Blocks of a page that are in use."""

    def check(self) -> None:
        """Adds everything up; raises InvalidArgumentError naming what does not fit."""

    @property
    def hits(self) -> int:
        """Cached blocks that were used again."""

    @property
    def misses(self) -> int:
        """Blocks that were handed out to be filled."""

    @property
    def evictions(self) -> int:
        """Cached blocks lost to that, or to a bound of the cache; not those lost to reclaim."""

    @property
    def free_blocks(self) -> int: ...
    @property
    def cached_blocks(self) -> int: ...
    @property
    def used_blocks(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def blocks_per_page(self) -> int: ...
    @property
    def num_pages(self) -> int: ...
    @property
    def present_pages(self) -> int: ...
    @property
    def empty_pages(self) -> int: ...
    @property
    def idle_pages(self) -> int: ...

class BlockQueue:
    """The free queue of an engine's own block objects, on top of Blocks. One thread."""

    def __init__(self, blocks: Blocks, objects: list[Any], hash_attribute: str) -> None: ...
    def popleft(self) -> Any: ...
    def popleft_n(self, n: int, /) -> list[Any]: ...
    def remove(self, block: Any, /) -> None: ...
    def append(self, block: Any, /) -> None: ...
    def append_n(self, blocks: Sequence[Any], /) -> None: ...
    def prepend_n(self, blocks: Sequence[Any], /) -> None: ...
    def get_all_free_blocks(self) -> list[Any]: ...
    def available(self) -> int: ...
    @property
    def num_free_blocks(self) -> int: ...
    @property
    def num_unused_blocks(self) -> int: ...

# --- ledger ---

def ledger_file_name(device: str) -> str: ...
def remove_ledger(directory: str, device: str) -> None:
    """Removes the ledger of a device that no process has open for writing.

    Raises InvalidArgumentError where one has, LedgerError for a file that is no ledger of ours.
    """

class Segment:
    @staticmethod
    def open(
        directory: str,
        device: str,
        capacity: int,
        headroom: int,
        create: bool,
        read_only: bool,
    ) -> Segment: ...
    @property
    def path(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def capacity(self) -> int: ...
    @property
    def headroom(self) -> int: ...
    @property
    def lock_fd(self) -> int: ...
    @property
    def usable(self) -> bool: ...
    @property
    def freed_seq(self) -> int: ...
    @property
    def pressure_seq(self) -> int: ...
    def join(self, instance: str, name: str, pinned: int) -> Account: ...
    def attach(self, instance: str, name: str, pinned: int) -> Member: ...
    def snapshot(self) -> dict[str, Any]: ...
    def reap(self) -> int: ...
    def set_guarantee(self, key: str, size_bytes: int, /) -> None: ...
    def set_limit(self, key: str, size_bytes: int | None, /) -> None: ...
    def set_weight(self, key: str, weight: float, /) -> None: ...
    def set_capacity(self, capacity: int | None, headroom: int | None, /) -> None: ...
    def set_foreign(self, size_bytes: int, /) -> None: ...
    def foreign_age_ms(self) -> int: ...
    def created(self) -> int: ...
    def ask_back(self, key: str, size_bytes: int, /) -> None: ...
    def wait_freed(self, seen: int, timeout_s: float, /) -> int: ...
    def wait_pressure(self, seen: int, timeout_s: float, /) -> int: ...
    def hold_lock(self, seconds: float, /) -> bool: ...
    def close(self) -> None: ...

class Account:
    @property
    def usable(self) -> bool: ...
    def lease(self, size_bytes: int, /) -> bool: ...
    def give_back(self, size_bytes: int, /) -> None: ...
    def leasable(self) -> int: ...
    def ceiling(self) -> int: ...
    def charge(self) -> int: ...
    def others_demand(self) -> int: ...
    def set_demand(self, size_bytes: int, /) -> None: ...
    def pressed(self) -> bool: ...
    def press(self) -> None: ...
    def standings(self) -> tuple[int, int, list[tuple[Any, ...]]]: ...
    @property
    def version(self) -> int: ...
    def publish(self, in_use: int, cached: int, warm: int, working: bool, /) -> None: ...
    def set_state(self, state: int, /) -> None:
        """0 while it starts, 1 once it serves, 2 while it sleeps."""
    def describe(self, block_bytes: int, block_tokens: int, page_bytes: int, /) -> None: ...
    def count_reclaimed(self, size_bytes: int, /) -> None: ...
    def publish_cache(
        self, hits: int, misses: int, evictions: int, by_pressure: int, /
    ) -> None: ...
    def asked(self) -> int: ...
    def answer(self, size_bytes: int, /) -> None: ...
    def close(self) -> None: ...

class Member:
    @property
    def usable(self) -> bool: ...
    def pin(self, size_bytes: int, /) -> bool: ...
    def describe(self, block_bytes: int, block_tokens: int, page_bytes: int, /) -> None: ...
    def set_aside(self, size_bytes: int, /) -> bool: ...
    def set_demand(self, size_bytes: int, /) -> None: ...
    def created(self, size_bytes: int, /) -> None: ...
    def released(self, size_bytes: int, /) -> None: ...
    def held(self) -> int: ...
    def close(self) -> None: ...

# --- mapper ---

class Mapper:
    """The mapping thread of an arena: pages come and go while the engine and its device work.

    ``arena`` must be empty, used by nobody else, and opened with a pool of at least its size; the
    mapper keeps the member's books. Any thread may call any method; the GIL is released. In a
    forked child every method raises InvalidArgumentError.
    """

    def __init__(self, arena: Arena, member: Member) -> None: ...
    def submit(
        self,
        unmap: Sequence[int],
        needed: Sequence[int],
        ahead: Sequence[int] = (),
        stream: int = 0,
    ) -> None:
        """Commands of the page pool; returns before they are carried out.

        ``unmap``: once the work that is enqueued on the device's ``stream`` by now is done.
        ``needed``: for the next step; pages that are mapped, or on their way, may be named again.
        ``ahead``: mapped when there is time; where the device refuses, not tried again before
        they are needed. Pages that were not
        wanted until now must be under a lease, and are booked at once; one that is still there is
        kept, and its new lease refunded. Raises InvalidArgumentError for a page that does not fit
        (then nothing has changed), LedgerError where the member is closed.
        """

    def need(self, pages: Sequence[int]) -> None:
        """Pages that are needed, and whose bytes the member holds already (``Member.pin``)."""

    def clear(self, stream: int = 0) -> None:
        """Unmaps all pages, once the work that is enqueued on ``stream`` by now is done."""

    def wait(self, pages: Sequence[int], timeout_s: float) -> bool:
        """Waits until these wanted pages are mapped; False if the time was not enough.

        Pages that were refused are tried once more. Raises, with the device's words, where it
        refuses: OutOfMemoryError for what may pass (with memory in quarantine, every refusal),
        or DriverError. The pages stay wanted and charged.
        """

    def give_up(self, pages: Sequence[int]) -> None:
        """Refunds those of the pages that are not mapped, until someone waits for them again."""

    def drain(self, timeout_s: float) -> bool:
        """Waits until the thread has nothing left that it can do.

        False if the time was not enough, or if pages wait for a fence that could not be recorded:
        the next submission tries again.
        """

    def missing(self, pages: Sequence[int]) -> int:
        """How many of the pages are not mapped."""

    def quarantined_bytes(self) -> int:
        """What the arena has in quarantine; does not wait for work in progress."""

    def counters(self) -> dict[str, int]:
        """Pages kept, cancelled and ahead_refused; fence_failures."""

    def check(self) -> None:
        """Add everything up; raises DriverError where the sums differ."""

    def close(self) -> None:
        """Ends the thread. Pages stay mapped and charged; those not yet mapped are refunded."""

# --- processes that end together ---

def end_with(pids: Sequence[int], grace_s: float = 0.0) -> None:
    """Ends this process (SIGKILL) ``grace_s`` seconds after any of ``pids`` has ended."""
