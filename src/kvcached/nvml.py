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

    def _call(self, name: str, *arguments: object) -> None:
        _check(self._library, getattr(self._library, name)(*arguments), f"{name} for {self.uuid}")


def uuid_of(index: int) -> str:
    """The UUID of the GPU with this index, in the order of the PCI bus. Raises as ``Gpu``."""
    library, handle = _open(), ctypes.c_void_p()
    what = f"GPU {index}"
    _check(library, library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)), what)
    uuid = ctypes.create_string_buffer(96)
    _check(library, library.nvmlDeviceGetUUID(handle, uuid, len(uuid)), what)
    return uuid.value.decode()


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
