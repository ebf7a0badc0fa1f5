"""The ranks of one SGLang engine come to the same decisions.

Each rank of a tensor-parallel engine has a scheduler of its own, and SGLang counts on all of them
deciding alike from the same requests. What a ledger answers changes from one look to the next. So
the first rank alone asks, and sends each answer to the others, which do not ask: they run the same
program on the same requests, and at the same place of it they take the next answer. An answer to
another question than theirs says that the ranks went different ways: the engine ends there, where
SGLang would wait for ever or say what no rank computed.
"""

from __future__ import annotations

import functools
import os
import secrets
import socket
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple
from typing import Any, ParamSpec, TypeVar

from kvcached.errors import EngineError, LedgerBusyError
from kvcached.policy import Target

GATHER_S = 60.0
"""How long the first rank waits for the others, which are at the same point of their start."""

# The questions, and what an answer to each looks like on its way.
_ANSWERS = {
    **{name: struct.Struct("<?") for name in ("lease", "pressed")},
    **{name: struct.Struct("<q") for name in ("leasable", "ceiling", "charge", "others_demand")},
    **{name: struct.Struct("<q") for name in ("version", "reap", "asked")},
    **{name: struct.Struct("<q") for name in ("freed_seq", "wait_freed")},
    "now": struct.Struct("<d"),
    "target": struct.Struct("<5q"),
}
_NAMES = ("", *_ANSWERS)
_NUMBERS = {name: number for number, name in enumerate(_NAMES)}
_BUSY = 0  # no question's number: the ledger's lock could not be had in time
_HEAD = struct.Struct("<BI")


def _head(question: str, arguments: tuple[Any, ...]) -> bytes:
    """What goes before an answer: its question, by its number and what its arguments come to."""
    return _HEAD.pack(_NUMBERS[question], hash(arguments) & 0xFFFFFFFF)


class Rank(ABC):
    """What a rank does with the questions and statements that concern the engine's accounts."""

    def __init__(self, pids: Sequence[int]) -> None:
        self.pids = tuple(pids)
        """The processes of other ranks that this one has to do with."""

    @abstractmethod
    def ask(self, question: str, *arguments: Any) -> Any:
        """The answer to a question, the same on all ranks. Blocks until the first rank has it.

        Raises EngineError where another rank has ended, or asks something else here;
        LedgerBusyError as the account does, on all ranks.
        """

    @abstractmethod
    def say(self, statement: str, *arguments: Any) -> None:
        """Tells the accounts something: once for all ranks."""

    @contextmanager
    def together(self) -> Iterator[None]:
        """The answers that are found while the block runs may travel in one message. Nothing in it
        may wait for other ranks.
        """
        yield

    @abstractmethod
    def close(self) -> None:
        """Leaves the others, who notice."""


class FirstRank(Rank):
    """Asks the accounts, and tells the others."""

    def __init__(self, others: Sequence[socket.socket]) -> None:
        super().__init__([_peer(other) for other in others])
        self._others = tuple(others)
        self._depth = 0
        self._unsent = bytearray()
        self.accounts: Any = None  # whom it asks, once they exist

    def ask(self, question: str, *arguments: Any) -> Any:
        try:
            answer = self._answer(question, arguments)
        except LedgerBusyError:
            self._send(_HEAD.pack(_BUSY, 0))
            raise
        values = astuple(answer) if isinstance(answer, Target) else (answer,)
        self._send(_head(question, arguments) + _ANSWERS[question].pack(*values))
        return answer

    def _answer(self, question: str, arguments: Sequence[Any]) -> Any:
        if question == "now":
            return time.monotonic()
        found = getattr(self.accounts, question)
        return found(*arguments) if callable(found) else found

    def say(self, statement: str, *arguments: Any) -> None:
        getattr(self.accounts, statement)(*arguments)

    @contextmanager
    def together(self) -> Iterator[None]:
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0 and self._unsent:
                self._flush()

    def close(self) -> None:
        for other in self._others:
            other.close()

    def _send(self, message: bytes) -> None:
        self._unsent += message
        if self._depth == 0:
            self._flush()

    def _flush(self) -> None:
        message = bytes(self._unsent)
        self._unsent.clear()
        try:
            for other in self._others:
                other.sendall(message)
        except OSError as error:
            raise EngineError(f"kvcached: another rank of this engine has ended: {error}") from None


class OtherRank(Rank):
    """Takes the first rank's answers."""

    def __init__(self, first: socket.socket) -> None:
        super().__init__([_peer(first)])
        self._answers = first.makefile("rb")
        first.close()  # the file keeps it open

    def ask(self, question: str, *arguments: Any) -> Any:
        head = self._read(_HEAD.size)
        if head[0] == _BUSY:
            raise LedgerBusyError("the ledger's lock could not be had in time, says the first rank")
        if head != _head(question, arguments):
            raise EngineError(
                f"kvcached: the ranks of this engine went different ways: this one asks for "
                f"{question}{arguments} where the first one asked for {_NAMES[head[0]]}"
            )
        values = _ANSWERS[question].unpack(self._read(_ANSWERS[question].size))
        return Target(*values) if question == "target" else values[0]

    def say(self, statement: str, *arguments: Any) -> None:
        pass  # the first rank says it

    def close(self) -> None:
        self._answers.close()

    def _read(self, size: int) -> bytes:
        data = self._answers.read(size)
        if len(data) < size:
            raise EngineError("kvcached: the first rank of this engine has ended")
        return data


class AgreedAccount:
    """The engine's accounts as every rank sees them: what ``pages.Lender`` needs and a little more.

    The methods are those of ``ledger.Account`` and ``group.AccountGroup``. One thread.
    """

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self.together = rank.together

    # --- questions

    def lease(self, size_bytes: int) -> bool:
        return bool(self._rank.ask("lease", size_bytes))

    def leasable(self) -> int:
        return int(self._rank.ask("leasable"))

    def ceiling(self) -> int:
        return int(self._rank.ask("ceiling"))

    def charge(self) -> int:
        return int(self._rank.ask("charge"))

    def others_demand(self) -> int:
        return int(self._rank.ask("others_demand"))

    def pressed(self) -> bool:
        return bool(self._rank.ask("pressed"))

    def version(self) -> int:
        return int(self._rank.ask("version"))

    def target(self, page: int, demand: int = 0) -> Target:
        plan: Target = self._rank.ask("target", page, demand)
        return plan

    def reap(self) -> int:
        return int(self._rank.ask("reap"))

    def asked(self) -> int:
        return int(self._rank.ask("asked"))

    @property
    def freed_seq(self) -> int:
        return int(self._rank.ask("freed_seq"))

    def wait_freed(self, seen_seq: int, timeout_s: float) -> int:
        return int(self._rank.ask("wait_freed", seen_seq, timeout_s))

    # --- statements

    def give_back(self, size_bytes: int) -> None:
        self._rank.say("give_back", size_bytes)

    def set_demand(self, size_bytes: int) -> None:
        self._rank.say("set_demand", size_bytes)

    def press(self) -> None:
        self._rank.say("press")

    def publish(self, in_use: int, cached: int, warm: int, working: bool = False) -> None:
        self._rank.say("publish", in_use, cached, warm, working)

    def publish_cache(self, hits: int, misses: int, evictions: int, by_pressure: int) -> None:
        self._rank.say("publish_cache", hits, misses, evictions, by_pressure)

    def count_reclaimed(self, size_bytes: int) -> None:
        self._rank.say("count_reclaimed", size_bytes)

    def answer(self, size_bytes: int) -> None:
        self._rank.say("answer", size_bytes)

    def set_ready(self, ready: bool = True) -> None:
        self._rank.say("set_ready", ready)


P = ParamSpec("P")
T = TypeVar("T")


def together(method: Callable[P, T]) -> Callable[P, T]:
    """For methods that ask several questions of ``self.account``: their answers travel together."""

    @functools.wraps(method)
    def asking(*args: P.args, **kwargs: P.kwargs) -> T:
        owner: Any = args[0]
        if not isinstance(owner.account, AgreedAccount):
            return method(*args, **kwargs)
        with owner.account.together():
            return method(*args, **kwargs)

    return asking


class AgreedClock:
    """The first rank's clock, read once a turn of the scheduler's loop: what depends on the time is
    the same on all ranks, for one message.
    """

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._now_s = 0.0

    def __call__(self) -> float:
        return self._now_s

    def turn(self) -> None:
        """A new turn begins."""
        self._now_s = self._rank.ask("now")


def gather(rank: int, ranks: int, share: Callable[[bytes], bytes], mine: bytes) -> tuple[str, Rank]:
    """Brings the ranks of an engine together: its instance id, and this rank's part.

    ``share`` gives every rank what it is called with on the first (as many bytes), by SGLang's own
    means; ``mine`` is what all ranks must have the same. Blocks until all are there. Raises
    EngineError where they do not come, or differ.
    """
    secret = secrets.token_bytes(16)
    with ExitStack() as to_close:
        here = to_close.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        here.settimeout(GATHER_S)
        try:
            if rank == 0:
                here.bind(_address(secret))
                here.listen(ranks)
            instance = share(secret)
            if rank == 0:
                others = [to_close.enter_context(_met(here, mine)) for _ in range(1, ranks)]
                to_close.pop_all()
                here.close()
                return instance.hex(), FirstRank(others)
            here.connect(_address(instance))
            _same_user(here)
            here.sendall(mine)
            here.settimeout(None)
        except OSError as error:
            raise EngineError(
                f"kvcached: the {ranks} ranks of this engine do not meet within {GATHER_S:g} s: "
                f"{error}"
            ) from error
        to_close.pop_all()
        return instance.hex(), OtherRank(here)


def _address(secret: bytes) -> str:
    """A name that no file system knows; it is gone with the socket."""
    return f"\0kvcached-{secret.hex()}"


def _met(here: socket.socket, mine: bytes) -> socket.socket:
    """The next rank that comes; it must have what this one has."""
    other = here.accept()[0]
    with ExitStack() as to_close:
        to_close.enter_context(other)
        other.settimeout(GATHER_S)
        _same_user(other)
        if other.recv(len(mine), socket.MSG_WAITALL) != mine:
            raise EngineError(
                "kvcached: the ranks of this engine have KV caches of different shapes: not "
                "supported"
            )
        other.settimeout(None)
        to_close.pop_all()
    return other


_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


def _credentials(other: socket.socket) -> tuple[int, int]:
    found = other.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(found)
    return pid, uid


def _peer(other: socket.socket) -> int:
    return _credentials(other)[0]


def _same_user(other: socket.socket) -> None:
    uid = _credentials(other)[1]
    if uid != os.geteuid():
        raise EngineError(f"kvcached: user {uid} answers where a rank of this engine should")
