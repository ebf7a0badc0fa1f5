"""All engines of a service on several hosts: placed, kept there, and placed anew where a host is
lost. In the service's process it stands where the supervisor stands on one machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvcached.hosts import weights
from kvcached.hosts.placement import Load, Places, Room, place, pressure
from kvcached.hosts.remote import RemoteModel, Replica
from kvcached.hosts.report import Cluster, HostLost, Link, Node, Report
from kvcached.router.engine_command import Reach
from kvcached.router.settings import HostsSettings, ModelSettings, ServeSettings
from kvcached.snapshot import LedgerSnapshot

logger = logging.getLogger(__name__)

_LOOK_S = 0.5
_AGAIN_S = 1.0
_ARRIVAL_LIMIT_S = 60.0
_STOP_MARGIN_S = 10.0


@dataclass(slots=True)
class Host:
    """A node whose agent answers."""

    node: Node
    link: Link
    room: Room
    report: Report | None = None


class HostedEngines:
    """Make it, and call everything, on the event loop."""

    def __init__(
        self, settings: ServeSettings, cluster: Cluster, show: Callable[[str], None]
    ) -> None:
        """``show`` gets each line that engines and agents print."""
        assert settings.hosts is not None
        self._settings = settings
        self._hosts_settings: HostsSettings = settings.hosts
        self._cluster = cluster
        self._show = show
        self._ending = False
        self._reach = Reach(key=secrets.token_urlsafe(32))
        self._hosts: dict[str, Host] = {}
        self._attended: dict[str, asyncio.Task[None]] = {}  # by a node's id
        self._arrived: dict[str, asyncio.Event] = {}
        self._placing = False
        self._follower: asyncio.Task[None] | None = None
        self._weights = {m.name: weights.size_of(m) for m in settings.models}
        self._measured: dict[str, tuple[float, int]] = {}  # tokens a second, bytes a token
        self.models: Mapping[str, RemoteModel] = {m.name: RemoteModel(m) for m in settings.models}
        """The upstreams, by name."""
        self.fault = asyncio.Event()
        """Set where a fault of ours ended the placing."""
        self.headers: Mapping[str, str] = self._reach.headers
        """What engines want to see in a request."""

    async def start(self) -> None:
        """Starts an agent on each node that is there, and places all models."""
        await self._attend_new_nodes()
        arrivals = [asyncio.create_task(event.wait()) for event in self._arrived.values()]
        if arrivals:
            await asyncio.wait(arrivals, timeout=_ARRIVAL_LIMIT_S)
        self._placing = True
        self._place()
        self._follower = asyncio.create_task(self._follow(), name="the follower of nodes")
        self._follower.add_done_callback(self._ended)

    async def stop(self) -> None:
        """Ends all engines, politely at first, and leaves the cluster."""
        self._placing, self._ending = False, True
        tasks = [*self._attended.values(), *([self._follower] if self._follower else [])]
        for model in self.models.values():
            model.end()
        limit_s = max(m.stop_timeout_s for m in self._settings.models) + _STOP_MARGIN_S
        stops = [asyncio.create_task(_stop(host)) for host in self._hosts.values()]
        if stops:
            await asyncio.wait(stops, timeout=limit_s)
        for task in (*tasks, *stops):
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await asyncio.to_thread(self._cluster.close)

    def status(self) -> dict[str, Any]:
        """For `/status`: plain values, ready for JSON."""
        loads = {load.model: load for load in self._loads()}
        hosts = []
        for name, host in self._hosts.items():
            here = [model for model, where in self._places().items() if name in where]
            found = pressure(host.room, [loads[model] for model in here])
            hosts.append({
                "name": name,
                "address": host.node.address,
                "memory_bytes": host.room.memory_bytes,
                "models": here,
                "kv_pressure": found if found != float("inf") else None,
            })  # fmt: skip
        models = [entry for model in self.models.values() for entry in model.status()]
        return {"hosts": hosts, "models": models}

    def ledgers(self) -> list[LedgerSnapshot]:
        """Of all hosts, as last reported; a device's name begins with its host's."""
        reports = [host.report for host in self._hosts.values() if host.report is not None]
        return [ledger for report in reports for ledger in report.ledgers]

    # -- Nodes ----------------------------------------------------------------------------------

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            await self._attend_new_nodes()

    async def _attend_new_nodes(self) -> None:
        wanted = self._hosts_settings.nodes
        for node in await self._cluster.nodes():
            named = wanted is None or node.name in wanted or node.address in wanted
            if named and node.id not in self._attended and node.name not in self._hosts:
                self._arrived[node.id] = asyncio.Event()
                task = asyncio.create_task(self._attend(node), name=f"agent of {node.name}")
                self._attended[node.id] = task
                task.add_done_callback(self._ended)

    async def _attend(self, node: Node) -> None:
        """One agent, from its start to its end."""
        host: Host | None = None
        link = self._cluster.agent(node, self._settings, self._reach.key)
        try:
            room = await asyncio.wait_for(link.begin(), _ARRIVAL_LIMIT_S)
            host = self._hosts[node.name] = Host(node, link, room)
            logger.info("%s (%s) serves: %s", node.name, node.address, room)
            self._arrived[node.id].set()
            self._place()
            while self._hosts.get(node.name) is host:
                await self._take_report(host)
        except (HostLost, asyncio.TimeoutError) as error:
            if not self._ending:
                logger.error("%s is lost: %s", node.name, error or "it says nothing")
        finally:
            self._arrived[node.id].set()
            link.kill()
            if host is not None:
                self._lose(host)
        await asyncio.sleep(_AGAIN_S)  # where the node lives, it gets another agent
        del self._attended[node.id]

    async def _take_report(self, host: Host) -> None:
        asked_s = time.monotonic()
        report = await asyncio.wait_for(host.link.report(), self._hosts_settings.lost_after_s)
        host.report = report
        for line in report.lines:
            self._show(f"{host.node.name}: {line}")
        for name, model in self.models.items():
            for replica in model.replicas:
                if replica.link is host.link:
                    replica.take(report, asked_s)
                    self._measure(name, report)

    def _lose(self, host: Host) -> None:
        """At once: its models go to others."""
        if self._hosts.get(host.node.name) is host:
            del self._hosts[host.node.name]
            self._place()

    def _measure(self, name: str, report: Report) -> None:
        found = report.models[name]
        if found.token_bytes is not None or found.tokens_per_s is not None:
            rate, size = self._measured.get(name, (-1.0, 0))
            rate = rate if found.tokens_per_s is None else found.tokens_per_s
            self._measured[name] = (rate, found.token_bytes or size)

    # -- Models ---------------------------------------------------------------------------------

    def _loads(self) -> list[Load]:
        return [self._load(model) for model in self._settings.models]

    def _load(self, model: ModelSettings) -> Load:
        said = model.load
        rate, size = self._measured.get(model.name, (-1.0, 0))
        return Load(
            model=model.name,
            tokens_per_s=said.tokens_per_s if rate < 0 else rate * self._replicas(model.name),
            token_bytes=size or said.token_bytes or 0,
            tpot_s=model.slo.tpot_ms / 1000,
            weights_bytes=self._weights[model.name],
            replicas=model.replicas,
        )

    def _replicas(self, name: str) -> int:
        return max(1, len(self.models[name].replicas))

    def _places(self) -> Places:
        return {
            name: tuple(replica.host for replica in model.replicas)
            for name, model in self.models.items()
        }

    def _place(self) -> None:
        """Gives every replica without a living host another one."""
        if not self._placing:
            return
        alive = {
            name: tuple(r.host for r in model.replicas if self._is_current(r))
            for name, model in self.models.items()
        }
        rooms = {name: host.room for name, host in self._hosts.items()}
        placed = place(self._loads(), rooms, alive)
        for name, where in placed.places.items():
            model = self.models[name]
            kept = {r.host: r for r in model.replicas if self._is_current(r)}
            replicas = [kept.get(host) or self._replica(name, host) for host in where]
            if tuple(replicas) != model.replicas:
                logger.info("%s is placed on %s", name, ", ".join(where) or "no host")
            model.change(replicas, placed.missing.get(name, ""))

    def _is_current(self, replica: Replica) -> bool:
        host = self._hosts.get(replica.host)
        return host is not None and host.link is replica.link

    def _replica(self, model: str, name: str) -> Replica:
        host = self._hosts[name]
        return Replica(model, name, host.link, self.models[model].tell, lambda: self._lose(host))

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A task that fails is a fault of ours: it must not go unseen."""
        with contextlib.suppress(asyncio.CancelledError):
            if (error := task.exception()) is not None:
                logger.critical("%s has failed", task.get_name(), exc_info=error)
                self.fault.set()


async def _stop(host: Host) -> None:
    with contextlib.suppress(HostLost):
        await host.link.stop()
