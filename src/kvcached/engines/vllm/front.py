"""The front end's part: what the engine is built from, and prompts that can never fit."""

from __future__ import annotations

import functools
import queue
from collections.abc import Sequence
from typing import Any

from kvcached import watch
from kvcached.config import Config
from kvcached.engines.ceiling import Ceiling
from kvcached.engines.registry import OFF
from kvcached.engines.vllm import adapter, classes, device, identity
from kvcached.engines.vllm.never_fits import RequestNeverFitsError, reason
from kvcached.errors import EngineError
from kvcached.ledger import Ledger

# vLLM answers the requests in flight with an error when its engine dies; it gets this long.
FAREWELL_S = 0.15
# Drafters of speculative decoding that were seen to give the same outputs with kvcached.
DRAFTERS = ("ngram",)


def take_hold(vllm_config: Any, config: Config, *, serves: bool) -> None:
    """Makes a finished configuration build elastic classes; one that does already is left alone.

    The classes are those that vLLM resolved, subclassed: naming ours before it resolves them
    would bypass its own choices (asynchronous scheduling, fall-backs).
    """
    if identity.assigned(vllm_config):
        return
    _refuse_unsupported(vllm_config)
    who = identity.assign(vllm_config, config)
    parallel, scheduling = vllm_config.parallel_config, vllm_config.scheduler_config
    parallel.worker_cls = classes.qualified_name("worker", parallel.worker_cls)
    resolve = getattr(scheduling, "get_scheduler_cls", lambda: scheduling.scheduler_cls)
    scheduling.scheduler_cls = classes.qualified_name("scheduler", resolve())
    devices = device.of(config, who.ranks)
    ledgers = device.open_ledgers(config, devices)
    cache = vllm_config.cache_config
    # vLLM's number is each rank's; vLLM 0.8 has none, there it is a plain attribute.
    if getattr(cache, "kv_cache_memory_bytes", None) is None:
        smallest = min(ledger.capacity for ledger in ledgers)
        cache.kv_cache_memory_bytes = config.virtual_bytes or smallest // devices.ranks_each
    if serves:
        follow_engine(ledgers, who.instance)


def _refuse_unsupported(vllm_config: Any) -> None:
    from vllm import envs
    from vllm.platforms import current_platform

    parallel, speculative = vllm_config.parallel_config, vllm_config.speculative_config
    platform = current_platform.device_type
    executor = parallel.distributed_executor_backend
    for what, wrong in {
        f"{platform} engines with this version of vLLM": platform
        not in adapter.current().PLATFORMS,
        "KV transfer (connectors, disaggregation, offload)": vllm_config.kv_transfer_config,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "data parallelism": parallel.data_parallel_size > 1,
        "context parallelism": _number(parallel, "decode_context_parallel_size") > 1
        or _number(parallel, "prefill_context_parallel_size") > 1,
        "tensor parallelism over several machines": _number(parallel, "nnodes") > 1,
        f"tensor parallelism with the executor {executor!r}": executor != "mp"
        and parallel.tensor_parallel_size > 1,
        "speculative decoding with other drafters than ngram": speculative is not None
        and speculative.method not in DRAFTERS,
        "sleep mode with this version of vLLM": vllm_config.model_config.enable_sleep_mode
        and not adapter.current().SLEEPS,
        "vLLM's V0 engine, which this version chose for these arguments": not getattr(
            envs, "VLLM_USE_V1", True
        ),
    }.items():
        if wrong:
            raise EngineError(f"kvcached does not support {what} yet. {OFF}")


def _number(parallel: Any, name: str) -> int:
    """How many times something is done in parallel; once, where a version has no such number."""
    return int(getattr(parallel, name, 1))


def follow_engine(ledgers: Sequence[Ledger], instance: str) -> None:
    """Ends this server soon after its engine process or a worker has ended."""

    def find() -> set[int] | None:
        accounts = [ledger.snapshot().account(instance) for ledger in ledgers]
        owned = [each for each in accounts if each is not None and each.owner_pid is not None]
        if len(owned) < len(ledgers):
            return None
        return {pid for each in owned for pid in each.pids}

    watch.end_with_found(find, FAREWELL_S)


def release_caller(client: Any) -> None:
    """Lets a caller who waits for the next output of an engine that has died know that: vLLM itself
    says so only where the engine could still say it.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    outputs = getattr(client, "outputs_queue", None)
    if client.resources.engine_dead and isinstance(outputs, queue.Queue):
        outputs.put_nowait(EngineDeadError())


def check_request(vllm_config: Any, request: Any) -> None:
    """Where the front end has a request's token ids: answers at once, with both numbers, what the
    engine could only let wait for ever. Raises RequestNeverFitsError.
    """
    who = identity.of(vllm_config)
    kept = len(request.prompt_token_ids or ())
    ceiling = _ceiling(who.ranks, who.instance)
    excess = ceiling.exceeded(kept)
    if excess is None:
        return
    window = vllm_config.model_config.get_sliding_window()
    if isinstance(window, int) and window < kept:
        kept = window
        excess = ceiling.exceeded(kept)
    if excess is not None:
        account = excess.account
        block = (account.block_tokens, account.block_bytes)
        words = f"{kept} prompt tokens"
        raise RequestNeverFitsError(reason(words, excess.blocks, account.name, excess.most, block))


@functools.cache
def _ceiling(ranks: int, instance: str) -> Ceiling:
    config = Config.from_env()
    return Ceiling(device.open_ledgers(config, device.of(config, ranks)), instance)
