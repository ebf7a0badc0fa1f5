"""What engines print: each line with its model's name on the service's output, in a file that
rotates, and the last ones kept for the error that says why a start failed.
"""

from __future__ import annotations

import logging
import logging.handlers
import re
from collections import deque
from collections.abc import Callable

from kvcached.router.settings import LogSettings

KEPT_LINES = 200
MAX_LINE = 16 * 1024  # bytes; longer ones are cut into several
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")


class EngineLog:
    """The output of one model's engine over all its starts. Use from the event loop."""

    def __init__(self, name: str, settings: LogSettings, show: Callable[[str], None]) -> None:
        """``show`` gets each line with the model's name in front. Raises OSError where the folder
        cannot be made.
        """
        self.path = None
        self._show = show
        self._name = name
        self._rest = b""
        self._last: deque[str] = deque(maxlen=KEPT_LINES)
        self._file: logging.handlers.RotatingFileHandler | None = None
        if settings.folder is not None:
            settings.folder.mkdir(parents=True, exist_ok=True)
            self.path = settings.folder / (_UNSAFE.sub("-", name) + ".log")
            self._file = logging.handlers.RotatingFileHandler(
                self.path,
                maxBytes=settings.max_size,
                backupCount=settings.files,
                encoding="utf-8",
            )

    def add(self, line: str) -> None:
        """One line, of the engine or about it."""
        self._last.append(line)
        self._show(f"[{self._name}] {line}")
        if self._file is not None:
            self._file.emit(logging.LogRecord(self._name, 0, "", 0, line, None, None))

    def begin(self) -> None:
        """A new start: what earlier ones said is not why this one fails."""
        self._last.clear()

    def tail(self, lines: int) -> str:
        """The last lines since ``begin``."""
        return "\n".join(list(self._last)[-lines:])

    def take(self, printed: bytes) -> None:
        """What the engine printed next, in whatever pieces it comes."""
        *lines, self._rest = (self._rest + printed).split(b"\n")
        while len(self._rest) > MAX_LINE:
            lines.append(self._rest[:MAX_LINE])
            self._rest = self._rest[MAX_LINE:]
        for line in lines:
            self.add(line.decode("utf-8", "replace").rstrip("\r"))

    def end(self) -> None:
        """The engine prints nothing more: what it left of a line is one."""
        if self._rest:
            self.take(b"\n")

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
