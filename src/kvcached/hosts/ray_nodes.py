"""Nodes and agents on Ray: the only file that imports it.

An agent is an actor bound to its node, and one of this process's job: when the process ends, in
whatever way, Ray ends its agents, and with them their engines end. Ray restarts no agent: the
service starts another one, and places models anew.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kvcached.errors import ConfigError
from kvcached.hosts.agent import Agent
from kvcached.hosts.placement import Room
from kvcached.hosts.report import HostLost, Node, Report, Woken
from kvcached.router.settings import HostsSettings, ServeSettings

_CONCURRENT_CALLS = 10_000  # waits for a wake are calls


class RayCluster:
    """The cluster that this process has joined. Only one at a time in a process."""

    def __init__(self, settings: HostsSettings) -> None:
        """Joins it; seconds. Raises ConfigError where there is none.

        To be called before the service listens for signals: Ray wants to hear them as well.
        """
        address = None if settings.ray == "local" else settings.ray
        try:
            ray.init(
                address=address,
                logging_level=logging.WARNING,
                log_to_driver=False,  # what agents print comes with their reports, in order
                include_dashboard=False if address is None else None,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"hosts.ray: {settings.ray}: {error}") from None

    async def nodes(self) -> Sequence[Node]:
        found = await asyncio.to_thread(ray.nodes)
        return [
            Node(each["NodeID"], each["NodeName"], each["NodeManagerAddress"])
            for each in found
            if each["Alive"]
        ]

    def agent(self, node: Node, settings: ServeSettings, key: str) -> RayLink:
        assert settings.hosts is not None
        where = NodeAffinitySchedulingStrategy(node.id, soft=False)
        actor = (
            ray.remote(Agent)
            .options(
                num_cpus=0,
                max_concurrency=_CONCURRENT_CALLS,
                max_restarts=0,
                scheduling_strategy=where,
            )
            .remote(
                # Clients' keys are the service's alone.
                settings.model_copy(update={"api_keys": []}),
                *(node.name, node.address, key, settings.hosts.lost_after_s),
            )
        )
        return RayLink(actor)

    def close(self) -> None:
        ray.shutdown()


class RayLink:
    """See ``report.Link``."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def begin(self) -> Room:
        room: Room = await _answer(self._actor.begin.remote())
        return room

    async def report(self) -> Report:
        report: Report = await _answer(self._actor.report.remote())
        return report

    async def wake(self, model: str) -> Woken:
        woken: Woken = await _answer(self._actor.wake.remote(model))
        return woken

    def start(self, model: str) -> None:
        self._actor.start.remote(model)

    def hold(self, model: str, number: int, held: bool) -> None:
        self._actor.hold.remote(model, number, held)

    def suspect(self, model: str, reason: str) -> None:
        self._actor.suspect.remote(model, reason)

    async def stop(self) -> None:
        await _answer(self._actor.stop.remote())
        self.kill()

    def kill(self) -> None:
        ray.kill(self._actor)


async def _answer(reference: Awaitable[Any]) -> Any:
    try:
        return await reference
    except RayError as error:
        raise HostLost(str(error).strip()) from None
