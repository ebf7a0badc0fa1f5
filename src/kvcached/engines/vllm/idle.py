"""Reaching an engine that is idle, or in another process: pressure, empty steps, deaths.

The engine's own loop does the work; a foreign thread only wakes it, with a message that the loop
already understands.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from typing import Any

from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.request import RequestStatus

from kvcached import watch
from kvcached.commands import Commands
from kvcached.engines import surroundings
from kvcached.engines.vllm import sleeping
from kvcached.engines.vllm.device import Device
from kvcached.engines.vllm.scheduler import ElasticScheduler
from kvcached.errors import EngineError
from kvcached.ledger import Account, Ledger
from kvcached.pages import PagePool
from kvcached.sharing import FairShare

logger = logging.getLogger(__name__)


def attach(engine: Any) -> None:
    """Follows one ``EngineCore`` from now on; called when it is built. A second call does nothing:
    a patched vLLM calls it beside the plugin.
    """
    scheduler = engine.scheduler
    if not isinstance(scheduler, ElasticScheduler):
        raise EngineError(
            f"kvcached: vLLM built {type(scheduler).__qualname__} instead of an elastic scheduler"
        )
    if scheduler.followed:
        return
    scheduler.followed = True
    scheduler.carry = carry = functools.partial(_carry, engine.model_executor)
    sleeping.attach(engine, scheduler, carry)
    if hasattr(engine, "input_queue"):
        watch.end_with_parent(*_worker_pids(scheduler))
        wake = _wake_by_message(engine)
    else:
        wake = _share_step(engine, scheduler)
    scheduler.account.set_ready()
    for one_device in zip(scheduler.accounts, scheduler.ledgers, scheduler.devices, strict=True):
        threading.Thread(
            target=follow_pressure,
            args=(scheduler.pages, wake, *one_device, scheduler.instance),
            name="kvcached-pressure",
            daemon=True,
        ).start()


def _carry(executor: Any, commands: Commands) -> None:
    executor.collective_rpc("apply_commands", args=(commands,))


def _worker_pids(scheduler: ElasticScheduler) -> list[int]:
    accounts = [ledger.snapshot().account(scheduler.instance) for ledger in scheduler.ledgers]
    members = [member for each in accounts if each is not None for member in each.members]
    return [member.pid for member in members if member.pid != os.getpid()]


def follow_pressure(
    pages: PagePool, wake: Any, account: Account, ledger: Ledger, device: Device, instance: str
) -> None:
    """Wakes the engine when one of its devices asks for memory; a thread sleeps on each. It also
    logs what happens there.
    """
    fair = FairShare(account, pages.page_bytes)
    lookout = surroundings.Lookout(account, ledger, device.memory, instance, pages.gives)
    for rose in lookout.rounds():
        # Also without a call for it: what others use on the device may have grown.
        if not fair.pressed():
            continue
        plan = fair.news()
        gives = plan is not None and plan.give > 0
        # Who has little to give says later that it rests: who gives needs the cores now.
        rested = pages.rested() and (pages.gives() or not rose)
        if gives or rested or account.asked() > 0:
            wake()


def _wake_by_message(engine: Any) -> Any:
    """An empty abort reaches ``Scheduler.finish_requests`` on the engine's own thread."""

    def wake() -> None:
        engine.input_queue.put_nowait((EngineCoreRequestType.ABORT, []))

    return wake


def _share_step(engine: Any, scheduler: ElasticScheduler) -> Any:
    """An in-process engine has no loop: its caller steps it. A lock is shared with the step, and
    a step that leaves commands behind is followed by an empty one that carries them.
    """
    lock = threading.RLock()
    # The callers of vLLM 0.8's engines know ``step`` alone.
    step_name = "step_fn" if hasattr(engine, "step_fn") else "step"
    step = getattr(engine, step_name)  # as it is: flushing runs it under the lock already

    def flush() -> None:
        while (
            scheduler.pages.has_commands()
            and not scheduler.asleep
            and scheduler.get_num_unfinished_requests() == 0  # type: ignore[attr-defined]
        ):
            step()

    def locked(call: Any) -> Any:
        @functools.wraps(call)
        def with_lock(*args: Any, **kwargs: Any) -> Any:
            with lock:
                result = call(*args, **kwargs)
                flush()
                return result

        return with_lock

    for name in (
        *(step_name, "add_request", "abort_requests", "reset_prefix_cache"),
        *("sleep", "wake_up"),
    ):
        setattr(engine, name, locked(getattr(engine, name)))

    def wake() -> None:
        with lock:
            # With requests under way the caller is stepping, and each step gives back by itself.
            if scheduler.get_num_unfinished_requests() == 0:  # type: ignore[attr-defined]
                scheduler.finish_requests([], RequestStatus.FINISHED_ABORTED)
                flush()

    return wake
