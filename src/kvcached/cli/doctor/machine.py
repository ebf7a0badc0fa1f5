"""The compiled core, the kernel, the host's memory, the GPU's driver."""

from __future__ import annotations

import ctypes
import importlib
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import kvcached
from kvcached.cli.doctor.finding import Finding, error, note, ok, warning
from kvcached.errors import KvcachedError, UnavailableError
from kvcached.units import format_size

REBUILD = "pip install --force-reinstall --no-deps kvcached, or in a checkout: pip install -e ."
MIN_MAPS = 65530
"""The kernel's default for vm.max_map_count; arenas are sized for a quarter of it."""
_PAGE = 2 << 20

_CUDA = "libcuda.so.1"
_VMM_ATTRIBUTE = 102
"""CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED"""


def core() -> Iterator[Finding]:
    """Whether kvcached itself is whole."""
    python = platform.python_version()
    where = Path(kvcached.__file__).parent
    try:
        importlib.import_module("kvcached.vmm_ops")
    except ImportError as failed:
        text = f"kvcached {kvcached.__version__} in {where}: its core does not load: {failed}"
        yield error("core", text, f"build it for this Python ({python}): {REBUILD}")
        return
    yield ok("core", f"kvcached {kvcached.__version__} in {where}, Python {python}")


def host() -> Iterator[Finding]:
    """Whether the kernel gives what the ledger and host memory need, by using it."""
    release = platform.release()
    if sys.platform != "linux":
        yield error("kernel", f"{sys.platform} is not Linux", "run the engines on Linux")
        return
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as failed:
        text = f"Linux {release} refuses pidfd_open: {failed.strerror}"
        yield error("kernel", text, "use Linux 5.3 or newer, or allow the call in the container")
    else:
        yield ok("kernel", f"Linux {release}")
    yield _host_memory()
    maps = int(Path("/proc/sys/vm/max_map_count").read_text())
    if maps < MIN_MAPS:
        text = f"vm.max_map_count is {maps}: pages of host memory become large"
        yield warning("max_map_count", text, f"sysctl -w vm.max_map_count={MIN_MAPS}")


def _host_memory() -> Finding:
    """Maps one page of host memory and gives it back."""
    from kvcached import vmm_ops

    try:
        backend = vmm_ops.host_backend("doctor")
        free, total = vmm_ops.host_memory_info()
        arena = vmm_ops.Arena(backend, [(0, _PAGE)], 1, _PAGE)
        arena.map([0])
        arena.unmap([0])
    except (KvcachedError, MemoryError) as failed:
        do = "raise the container's memory limit, or free memory"
        return error("host memory", f"a page of host memory cannot be mapped: {failed}", do)
    return ok("host memory", f"{format_size(free)} of {format_size(total)} can be had")


def gpu() -> Iterator[Finding]:
    """The driver, and whether each GPU can map memory under addresses. Makes no CUDA context: that
    would take hundreds of megabytes of a GPU that may be full.
    """
    try:
        library = ctypes.CDLL(_CUDA)
    except OSError:
        yield note("gpu", f"no GPU driver ({_CUDA}): engines share the host's memory")
        return
    if result := library.cuInit(0):
        text = f"the GPU driver is installed but does not start (cuInit: {result})"
        do = "look at nvidia-smi; in a container, pass the GPU in (docker run --gpus all)"
        yield error("gpu", text, do)
        return
    version, count = ctypes.c_int(), ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(version))
    library.cuDeviceGetCount(ctypes.byref(count))
    cuda = f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    if count.value == 0:
        do = "pass a GPU in, or look at CUDA_VISIBLE_DEVICES"
        yield warning("gpu", f"the driver ({cuda}) shows no GPU to this process", do)
    for ordinal in range(count.value):
        yield _vmm(library, ordinal, cuda)
    yield from _management_library()


def _vmm(library: ctypes.CDLL, ordinal: int, cuda: str) -> Finding:
    device, supported = ctypes.c_int(), ctypes.c_int()
    library.cuDeviceGet(ctypes.byref(device), ordinal)
    result = library.cuDeviceGetAttribute(ctypes.byref(supported), _VMM_ATTRIBUTE, device)
    if result == 0 and supported.value:
        return ok("gpu", f"GPU {ordinal}: driver for {cuda}, virtual memory management works")
    text = f"GPU {ordinal}: no virtual memory management with this driver ({cuda}) or platform"
    return error(
        "gpu", text, "use a driver for CUDA 11.2 or newer, on bare metal or with passthrough"
    )


def _management_library() -> Iterator[Finding]:
    from kvcached import nvml

    try:
        for uuid in nvml.uuids():
            used, total = nvml.Gpu(uuid).memory()
            yield ok("gpu memory", f"{uuid}: {format_size(used)} of {format_size(total)} in use")
    except UnavailableError as failed:
        text = f"what is in use on the GPU cannot be measured: {failed}"
        do = "install the driver's libnvidia-ml.so.1; in a container, allow the capability utility"
        yield error("gpu memory", text, do)
