"""Checks installation on vLLM's real classes; run by test_refusals.py."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

from vllm import envs
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.core import EngineCore, EngineCoreProc
from vllm.v1.engine.core_client import MPClient

from kvcached.engines.vllm.plugin import register

try:
    from vllm.v1.engine.input_processor import InputProcessor
except ImportError:  # vLLM 0.8
    from vllm.v1.engine.processor import Processor as InputProcessor

SEAMS = {
    (EngineArgs, "create_engine_config"),
    (InputProcessor, "process_inputs"),
    (EngineCore, "__init__"),
    (EngineCoreProc, "run_busy_loop"),
}
if InputProcessor.__name__ == "Processor":
    SEAMS.add((EngineCore, "shutdown"))  # nobody tells its schedulers
else:
    from vllm.v1.engine.output_processor import OutputProcessor

    SEAMS |= {(MPClient, "shutdown"), (OutputProcessor, "process_outputs")}


def state() -> dict[type, dict[str, Any]]:
    return {owner: dict(vars(owner)) for owner, _ in SEAMS}


def check_what_is_refused() -> None:
    """Of what runs an engine on several devices, only tensor parallelism on one machine."""
    from vllm.platforms import current_platform

    from kvcached.engines.vllm import adapter
    from kvcached.engines.vllm.front import _refuse_unsupported
    from kvcached.errors import EngineError

    platforms = adapter.current().PLATFORMS
    assert set(platforms) <= {"cpu", "cuda"}
    adapter.current().PLATFORMS = (*platforms, current_platform.device_type)

    plain: dict[str, Any] = {
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 1,
        "data_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "nnodes": 1,
        "distributed_executor_backend": "mp",
    }

    def check(**changes: Any) -> None:
        config = SimpleNamespace(
            parallel_config=SimpleNamespace(**{**plain, **changes}),
            kv_transfer_config=None,
            speculative_config=None,
            model_config=SimpleNamespace(enable_sleep_mode=False),
        )
        _refuse_unsupported(config)

    check()
    if hasattr(envs, "VLLM_USE_V1"):
        os.environ["VLLM_USE_V1"] = "0"
        try:
            check()
        except EngineError as error:
            assert "V0 engine" in str(error)
        else:
            raise AssertionError("the V0 engine was accepted")
        os.environ["VLLM_USE_V1"] = "1"
    for changes, words in [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"data_parallel_size": 2}, "data parallelism"),
        ({"decode_context_parallel_size": 2}, "context parallelism"),
        ({"nnodes": 2}, "over several machines"),
        ({"distributed_executor_backend": "ray"}, "executor 'ray'"),
    ]:
        try:
            check(**changes)
        except EngineError as error:
            assert words in str(error), error
        else:
            raise AssertionError(f"{changes} was accepted")


def check_a_rank_that_fails() -> None:
    """The first rank's error reaches vLLM; any other ends its process, which ends the engine."""
    from kvcached.commands import Commands
    from kvcached.engines.vllm.worker import ElasticWorker
    from kvcached.errors import OutOfMemoryError

    def refuse(commands: Commands, stream: int) -> None:
        raise OutOfMemoryError("host:b refused 2 MiB under a lease")

    worker = ElasticWorker()
    worker._warm, worker._device = True, SimpleNamespace(memory=None)
    worker.mapper = SimpleNamespace(apply=refuse)  # type: ignore[assignment]
    step = SimpleNamespace(kvcached_commands=Commands((), (1,)))
    worker.rank, worker.is_driver_worker = 0, True
    try:
        worker._carry_out(step)
    except OutOfMemoryError:
        pass
    else:
        raise AssertionError("the step must fail")
    if (child := os.fork()) == 0:
        worker.rank, worker.is_driver_worker = 1, False
        worker._carry_out(step)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def main() -> None:
    untouched = state()
    os.environ["ENABLE_KVCACHED"] = "false"
    register()
    del os.environ["ENABLE_KVCACHED"]
    register()
    assert state() == untouched
    assert "kvcached.vmm_ops" not in sys.modules
    assert "kvcached.engines.vllm.install" not in sys.modules
    os.environ["ENABLE_KVCACHED"] = "true"

    from kvcached.engines.base import Seam
    from kvcached.engines.vllm import adapter
    from kvcached.engines.vllm.install import uninstall
    from kvcached.errors import EngineError

    assert state() == untouched, "importing the adapter must not install it"
    this_version = adapter.current()
    original = this_version.seams

    def with_a_renamed_one() -> list[Any]:
        return [*original(), Seam(EngineCore, "step_of_another_version", lambda old: old)]

    this_version.seams = with_a_renamed_one
    try:
        register()
    except EngineError as error:
        message = str(error)
    else:
        raise AssertionError("a missing seam was accepted")
    assert "vllm.v1.engine.core.EngineCore.step_of_another_version" in message, message
    assert "Unset ENABLE_KVCACHED" in message
    assert state() == untouched

    this_version.seams = original
    register()
    register()  # a second call changes nothing
    installed = state()
    changed = {
        (owner, name)
        for owner, before in untouched.items()
        for name, value in before.items()
        if installed[owner][name] is not value
    }
    assert changed == SEAMS, changed
    uninstall()
    assert state() == untouched
    uninstall()
    check_what_is_refused()
    check_a_rank_that_fails()


if __name__ == "__main__":
    main()
