"""What the conformance suite needs of a device beside its backend: access to the raw bytes, and
what the system itself says about physical memory."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

from kvcached import vmm_ops


class HostDevice:
    """The host backend, checked against the kernel's own books."""

    _count = 0

    def __init__(self) -> None:
        HostDevice._count += 1
        self.name = f"conformance-{os.getpid()}-{HostDevice._count}"
        self.backend = vmm_ops.host_backend(self.name)

    @property
    def chunk(self) -> int:
        """A convenient size for a page: several granules, so that partial work would show."""
        return 4 * self.backend.granularity

    def write(self, address: int, value: int, size: int) -> None:
        ctypes.memset(address, value, size)

    def read(self, address: int, size: int) -> bytes:
        return ctypes.string_at(address, size)

    def physical_bytes(self) -> int:
        """Bytes that the kernel has allocated for this backend."""
        return sum(os.stat(f"/proc/self/fd/{fd}").st_blocks * 512 for fd in self.descriptors())

    def descriptors(self) -> Iterator[int]:
        wanted = f"/memfd:kvcached:{self.name} (deleted)"
        for entry in os.listdir("/proc/self/fd"):
            try:
                if os.readlink(f"/proc/self/fd/{entry}") == wanted:
                    yield int(entry)
            except OSError:
                continue  # the descriptor of the listing itself

    def placed_bytes(self, address: int, size: int) -> int:
        """Bytes of an address range that the kernel has memory mapped at."""
        return sum(stop - start for start, stop, name in _mappings(address, size) if name)

    def mappings(self, address: int, size: int) -> int:
        return len(list(_mappings(address, size)))


class CudaDevice:
    """The CUDA backend, its bytes read and written through the driver."""

    def __init__(self) -> None:
        self.backend = vmm_ops.cuda_backend(0)
        self._cuda = ctypes.CDLL("libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._context = context

    @property
    def chunk(self) -> int:
        return 2 * self.backend.granularity

    def write(self, address: int, value: int, size: int) -> None:
        self._call("cuCtxPushCurrent_v2", self._context)
        pointer, count = ctypes.c_uint64(address), ctypes.c_size_t(size)
        self._call("cuMemsetD8_v2", pointer, ctypes.c_ubyte(value), count)
        self._call("cuCtxSynchronize")
        self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def read(self, address: int, size: int) -> bytes:
        data = ctypes.create_string_buffer(size)
        self._call("cuCtxPushCurrent_v2", self._context)
        self._call("cuMemcpyDtoH_v2", data, ctypes.c_uint64(address), ctypes.c_size_t(size))
        self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
        return data.raw

    def physical_bytes(self) -> int:
        """The driver keeps no books for one process; the probe's count stands in for them."""
        return self.backend.created_bytes()

    def placed_bytes(self, address: int, size: int) -> int | None:
        return None

    def mappings(self, address: int, size: int) -> int | None:
        return None

    def _call(self, name: str, *arguments: object) -> None:
        result = getattr(self._cuda, name)(*arguments)
        assert result == 0, f"{name} answered {result}"


Device = HostDevice | CudaDevice


def _mappings(address: int, size: int) -> Iterator[tuple[int, int, str]]:
    """Start, end and name (empty: a hole) of the kernel's mappings inside an address range."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        start, stop = (int(number, 16) for number in fields[0].split("-"))
        start, stop = max(start, address), min(stop, address + size)
        if start < stop:
            yield start, stop, fields[5] if len(fields) > 5 else ""
