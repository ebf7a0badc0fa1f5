from collections.abc import Sequence
from typing import Literal

# --- arena: backends, reservations and mappings ---

_Operation = Literal["reserve", "free_reservation", "create", "map", "access", "unmap", "release"]

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
    ) -> None:
        """``pool_bytes``: how much memory of unmapped pages is kept for reuse (with its contents).

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

    def is_mapped(self, page: int) -> bool: ...
    def mapped_pages(self) -> list[int]:
        """The mapped pages, ascending."""

    def mapped_bytes(self) -> int: ...
    def created_bytes(self) -> int:
        """Bytes that occupy the device for this arena: mapped, pooled and in quarantine."""

    def pooled_bytes(self) -> int: ...
    def quarantined_bytes(self) -> int: ...
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
