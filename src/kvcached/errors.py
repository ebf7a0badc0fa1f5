"""The exceptions of kvcached.

    KvcachedError
    ├── ConfigError            a variable or argument has a value that is not allowed
    ├── InvalidArgumentError   a block, page or size that does not fit (also a ValueError)
    ├── OutOfMemoryError       the device has no memory for a page (also a MemoryError)
    ├── DriverError            the driver or the kernel refused for another reason
    ├── UnavailableError       no driver, device or virtual memory management on this machine
    ├── LedgerError            the ledger file is cut, foreign or of another version
    │   └── LedgerBusyError    a live process holds the ledger's lock and does not let go
    ├── EngineError            kvcached cannot take hold of this engine
    │   └── UnsupportedEngineError   its version is not supported
    └── RequestTooLargeError   a request needs more than the instance can ever get (ValueError)

Shortage that may pass is never an exception: it is a value (``None`` or ``False``).
"""

from __future__ import annotations


class KvcachedError(Exception):
    """Base of everything that kvcached raises on purpose."""


class ConfigError(KvcachedError, ValueError):
    """A variable or argument has a value that is not allowed; the message names all three."""


class InvalidArgumentError(KvcachedError, ValueError):
    """A block, page or size that does not fit; state is unchanged."""


class OutOfMemoryError(KvcachedError, MemoryError):
    """The device has no memory for a page; the operation was rolled back."""


class DriverError(KvcachedError):
    """The driver or the kernel refused an operation for a reason other than memory."""


class UnavailableError(KvcachedError):
    """This machine has no driver, device or virtual memory management of the wanted kind."""


class LedgerError(KvcachedError):
    """The ledger file is cut, foreign, of another version or of another device."""


class LedgerBusyError(LedgerError):
    """A live process holds the ledger's lock and did not let go in time."""


class EngineError(KvcachedError):
    """kvcached is switched on and cannot take hold of the engine."""


class UnsupportedEngineError(EngineError):
    """No adapter of kvcached supports the engine's version."""


class RequestTooLargeError(KvcachedError, ValueError):
    """A request needs more memory than its instance can ever get."""
