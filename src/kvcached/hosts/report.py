"""What travels between the service and its agents, and what an agent is to the service."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvcached.errors import KvcachedError
from kvcached.hosts.placement import Room
from kvcached.router.settings import ServeSettings
from kvcached.router.upstream import State
from kvcached.snapshot import LedgerSnapshot


class HostLost(KvcachedError):
    """An agent has ended, or its node cannot be reached."""


@dataclass(frozen=True, slots=True)
class ModelReport:
    """One model on one host."""

    state: State
    url: str
    status: Mapping[str, Any]
    """For `/status`."""
    tokens_per_s: float | None
    """As its engine counts them; None where it does not say."""
    token_bytes: int | None
    """Of KV cache, as the ledger says; None until its engine has run."""


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that an agent knows at one moment."""

    number: int
    """Counted up: what has a smaller one is older."""
    models: Mapping[str, ModelReport]
    ledgers: tuple[LedgerSnapshot, ...]
    lines: tuple[str, ...] = ()
    """What engines and the agent have printed since the report before."""


@dataclass(frozen=True, slots=True)
class Woken:
    """The outcome of a wake: ``down`` is why the model cannot be used, empty if it can."""

    report: Report
    down: str = ""
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster."""

    id: str
    """Another one when it comes back."""
    name: str
    address: str


class Link(Protocol):
    """An agent, as seen from the service's event loop. What waits raises HostLost."""

    async def begin(self) -> Room:
        """Returns once the agent runs: what its node has for models."""

    async def report(self) -> Report:
        """The next report, to be asked for one after the other: at once where states differ from
        those of the last one, else soon.
        """

    async def wake(self, model: str) -> Woken:
        """Returns once the model's engine answers, or cannot."""

    def start(self, model: str) -> None:
        """Starts its engine without waiting for it."""

    def hold(self, model: str, number: int, held: bool) -> None:
        """Whether requests are with it. ``number`` counts up: messages may overtake each other."""

    def suspect(self, model: str, reason: str) -> None:
        """Its engine refused or broke a connection."""

    async def stop(self) -> None:
        """Ends its engines politely, and then the agent."""

    def kill(self) -> None:
        """Ends the agent, and with it whatever it started."""


class Cluster(Protocol):
    """Where nodes and agents come from."""

    async def nodes(self) -> Sequence[Node]:
        """Those that live, as the cluster knows."""

    def agent(self, node: Node, settings: ServeSettings, key: str) -> Link:
        """Starts an agent on a node, whose engines ask for ``key``."""

    def close(self) -> None:
        """Leaves the cluster: what was started there ends."""
