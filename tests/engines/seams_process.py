"""Checks installation on vLLM's real classes; run by test_refusals.py."""

from __future__ import annotations

import os
import sys
from typing import Any

from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.input_processor import InputProcessor

from kvcached.engines.vllm.plugin import register

SEAMS = {
    EngineArgs: "create_engine_config",
    InputProcessor: "process_inputs",
    EngineCore: "__init__",
}


def state() -> dict[type, dict[str, Any]]:
    return {owner: dict(vars(owner)) for owner in SEAMS}


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

    def with_a_renamed_one(config: Any) -> list[Any]:
        return [*original(config), Seam(EngineCore, "step_of_another_version", lambda old: old)]

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
    assert changed == set(SEAMS.items()), changed
    uninstall()
    assert state() == untouched
    uninstall()


if __name__ == "__main__":
    main()
