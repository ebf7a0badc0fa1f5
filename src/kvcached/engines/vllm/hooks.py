"""The places in vLLM's own code where kvcached is called: by the seams that the plugin puts there,
or by lines that a patch (``engine_integration/scripts``) adds to vLLM's source. Both together do no
harm: each hook does its work once. Switched off, a hook returns what it was given.
"""

from __future__ import annotations

import functools
from typing import Any

from kvcached.config import Config
from kvcached.engines.vllm import identity


def configured(vllm_config: Any, usage_context: Any = None) -> Any:
    """At the end of ``EngineArgs.create_engine_config``: makes the configuration build elastic
    classes, and returns it.

    Raises EngineError where kvcached is switched on and cannot take hold.
    """
    config = Config.from_env()
    if config.enabled:
        from vllm.usage.usage_lib import UsageContext

        from kvcached.engines.vllm import front, install

        install.install(config)
        front.take_hold(vllm_config, config, serves=usage_context == UsageContext.OPENAI_API_SERVER)
    return vllm_config


def processed(vllm_config: Any, request: Any) -> Any:
    """At the end of the front end's ``process_inputs``: returns the request, or raises
    RequestNeverFitsError with both numbers if its engine can never have memory for it.
    """
    if identity.assigned(vllm_config):
        _front().check_request(vllm_config, request)
    return request


@functools.cache  # an import statement for each request costs as much as its check
def _front() -> Any:
    from kvcached.engines.vllm import front

    return front


def answered(processor: Any, outputs: Any) -> Any:
    """Before the front end's ``process_outputs``: callers whose requests outgrew what their engine
    can get are told so, with both numbers. Returns what ``gave_up`` wants.
    """
    from kvcached.engines.vllm import never_fits

    return never_fits.answer(processor, outputs)


def gave_up(processor: Any, failed: Any, processed: Any) -> Any:
    """After it: returns what it returned, with the samples that nobody waits for any more."""
    if failed:
        from kvcached.engines.vllm import never_fits

        processed.reqs_to_abort.extend(never_fits.give_up_siblings(processor, failed))
    return processed


def built(engine: Any) -> None:
    """At the end of ``EngineCore.__init__``: an engine in its caller's process is followed from
    here. One in a process of its own is not whole yet: see ``runs``.
    """
    from vllm.v1.engine.core import EngineCoreProc

    if not isinstance(engine, EngineCoreProc):
        _attach(engine)


def runs(engine: Any) -> None:
    """At the start of ``EngineCoreProc.run_busy_loop``. If that process was spawned, it may load
    plugins inside the constructor, which is too late to replace the constructor.
    """
    _attach(engine)


def ended(engine: Any) -> None:
    """At the end of ``EngineCore.shutdown``, where vLLM's schedulers have no end of their own."""
    if Config.from_env().enabled:
        engine.scheduler.shutdown()


def left_alone(client: Any) -> None:
    """At the end of ``MPClient.shutdown``, which vLLM calls when the engine's process has ended."""
    if Config.from_env().enabled:
        from kvcached.engines.vllm import front

        front.release_caller(client)


def _attach(engine: Any) -> None:
    if Config.from_env().enabled:
        from kvcached.engines.vllm import idle

        idle.attach(engine)
