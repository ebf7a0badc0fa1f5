"""A GPU as the driver's management library sees it: without a CUDA context, from any process.

The library (``libnvidia-ml.so.1``) belongs to the driver; it is opened at the first question.
"""

from __future__ import annotations

import ctypes

from kvcached.errors import UnavailableError

_LIBRARY = "libnvidia-ml.so.1"


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong),
                ("used", ctypes.c_ulonglong))  # fmt: skip


class _Process(ctypes.Structure):
    _fields_ = (("pid", ctypes.c_uint), ("used", ctypes.c_ulonglong),
                ("gpu_instance", ctypes.c_uint), ("compute_instance", ctypes.c_uint))  # fmt: skip


_INSUFFICIENT_SIZE = 7
_NOT_AVAILABLE = (1 << 64) - 1
"""The library's word for a size that it cannot tell, as inside containers."""


class Gpu:
    """One GPU, found by its UUID. Any thread may ask.

    Raises UnavailableError, with the driver's words, where there is no driver or no such GPU.
    """

    def __init__(self, uuid: str) -> None:
        self.uuid = uuid
        self._library = _open()
        self._handle = ctypes.c_void_p()
        self._call("nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(self._handle))

    def memory(self) -> tuple[int, int]:
        """Bytes that are not free now, whoever holds them, and all bytes; the driver's own part is
        in both.
        """
        memory = _Memory()
        self._call("nvmlDeviceGetMemoryInfo", self._handle, ctypes.byref(memory))
        return int(memory.total - memory.free), int(memory.total)

    def processes(self) -> dict[int, int]:
        """The processes with a CUDA context here, and how many bytes each of them holds (0 where
        the library cannot tell). Their ids are the host's, also inside a container.
        """
        # The library answers how many there are; a few may have started meanwhile.
        count = ctypes.c_uint(0)
        while True:
            found = (_Process * count.value)()
            name = "nvmlDeviceGetComputeRunningProcesses_v3"
            result = getattr(self._library, name)(self._handle, ctypes.byref(count), found)
            if result != _INSUFFICIENT_SIZE:
                break
            count.value += 4
        _check(self._library, result, f"{name} for {self.uuid}")
        sizes = {each.pid: each.used for each in found[: count.value]}
        return {pid: 0 if used == _NOT_AVAILABLE else used for pid, used in sizes.items()}

    def _call(self, name: str, *arguments: object) -> None:
        _check(self._library, getattr(self._library, name)(*arguments), f"{name} for {self.uuid}")


def uuids() -> list[str]:
    """The UUIDs of the machine's GPUs, in the order of the PCI bus. Raises as ``Gpu``."""
    library, count = _open(), ctypes.c_uint()
    _check(library, library.nvmlDeviceGetCount_v2(ctypes.byref(count)), "nvmlDeviceGetCount_v2")
    return [uuid_of(index) for index in range(count.value)]


def uuid_of(index: int) -> str:
    """The UUID of the GPU with this index, in the order of the PCI bus. Raises as ``Gpu``."""
    library, handle = _open(), ctypes.c_void_p()
    what = f"GPU {index}"
    _check(library, library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)), what)
    uuid = ctypes.create_string_buffer(96)
    _check(library, library.nvmlDeviceGetUUID(handle, uuid, len(uuid)), what)
    return uuid.value.decode()


def visible_uuid(ordinal: int, visible: str | None) -> str:
    """The UUID of the GPU that CUDA counts as ``ordinal`` where ``CUDA_VISIBLE_DEVICES`` is
    ``visible``: it chooses and orders them, by numbers (of the PCI bus) or by beginnings of UUIDs.

    Raises UnavailableError as ``Gpu``, and for a GPU that is not visible.
    """
    if visible is None:
        return uuid_of(ordinal)
    names = [name.strip() for name in visible.split(",")]
    if ordinal < len(names):
        name = names[ordinal]
        if name.isdecimal():
            return uuid_of(int(name))
        found = [uuid for uuid in uuids() if name and uuid.startswith(name)]
        if len(found) == 1:
            return found[0]
    raise UnavailableError(f"GPU {ordinal} of CUDA_VISIBLE_DEVICES={visible}: no such GPU")


def _open() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise UnavailableError(f"the GPU driver's library {_LIBRARY}: {error}") from error
    library.nvmlErrorString.restype = ctypes.c_char_p
    # Counted by the library: every Gpu initialises it, and the process's end gives it back.
    _check(library, library.nvmlInit_v2(), "nvmlInit_v2")
    return library


def _check(library: ctypes.CDLL, result: int, what: str) -> None:
    if result != 0:
        words = library.nvmlErrorString(result).decode(errors="replace")
        raise UnavailableError(f"{what}: {words}")
