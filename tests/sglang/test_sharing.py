"""Two SGLang engines under one budget: memory goes to whoever works, and comes back at a death."""

from __future__ import annotations

import importlib
import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sgl_harness import MAX_TOKENS, MIB, PROMPTS, Engine, MemoryWatch, switched_on, wait_until

from kvcached.ledger import Ledger
from kvcached.snapshot import AccountSnapshot

pytestmark = pytest.mark.engine
CAPACITY = 6 * MIB  # of which a burst takes almost all


def sleeps_on_idle() -> dict[str, Any]:
    """SGLang's option for idle engines, where the version has it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        server_args = importlib.import_module("sglang.srt.server_args").ServerArgs
    names = getattr(server_args, "__annotations__", {}) | getattr(
        server_args, "__dataclass_fields__", {}
    )
    known = "sleep_on_idle" in names or hasattr(server_args, "sleep_on_idle")
    return {"sleep_on_idle": True} if known else {}


class Two:
    """Both engines, and the ledger between them."""

    def __init__(self, model: Path, folder: Path) -> None:
        job = {"task": "bursts", "model": str(model), "arguments": sleeps_on_idle()}
        virtual = str(64 * MIB)
        self.a, self.b = (
            Engine(folder / n, job, switched_on(folder, CAPACITY, n, KVCACHED_VIRTUAL=virtual))
            for n in ("a", "b")
        )
        self._bursts = {self.a: 0, self.b: 0}
        for engine in (self.a, self.b):
            engine.answer(200)
        place = (folder / "ledger", f"host:test-{os.getpid()}")
        self.ledger = Ledger.open(*place, create=False, read_only=True)

    def account(self, engine: Engine) -> AccountSnapshot | None:
        return self.ledger.snapshot().account(engine.folder.name)

    def start_burst(self, engine: Engine) -> None:
        (engine.folder / f"burst-{self._bursts[engine]}").touch()
        self._bursts[engine] += 1

    def outputs(self, engine: Engine) -> list[list[int]]:
        """Of the burst that was started last."""
        outputs: list[list[int]] = engine.answer(outputs=self._bursts[engine])["outputs"][-1]
        return outputs


@contextmanager
def two(model: Path, folder: Path) -> Iterator[Two]:
    both = Two(model, folder)
    try:
        yield both
    finally:
        both.ledger.close()
        both.a.kill()
        both.b.kill()


def test_bursts_in_turn_at_once_and_after_a_death(
    model: Path, reference: list[list[int]], tmp_path: Path
) -> None:
    assert len(reference) == len(PROMPTS) and len(reference[0]) == MAX_TOKENS
    with two(model, tmp_path) as both, MemoryWatch(both.a, both.b) as memory:
        for engine in (both.a, both.b, both.a):  # each meets the other's cached prefixes
            both.start_burst(engine)
            assert both.outputs(engine) == reference
            account = both.account(engine)
            assert account is not None and account.charge > CAPACITY // 2
        before = both.account(both.b)
        assert before is not None and before.reclaimed > 0

        for engine in (both.a, both.b):
            both.start_burst(engine)
        assert both.outputs(both.a) == both.outputs(both.b) == reference

        both.start_burst(both.a)
        wait_until(lambda: charge(both, both.a) > MIB, 30, "a works")
        processes = both.a.processes()
        os.kill(both.a.process.pid, signal.SIGKILL)
        both.a.process.wait()
        gone = wait_until(lambda: not both.a.processes(), 5, f"{processes} end with their parent")
        assert gone < 1.5
        both.start_burst(both.b)
        assert both.outputs(both.b) == reference
        wait_until(lambda: charge(both, both.a) == 0, 10, "b clears the row of the dead")
    assert memory.peak <= CAPACITY and memory.peak > CAPACITY * 3 // 4


def charge(both: Two, engine: Engine) -> int:
    account = both.account(engine)
    return 0 if account is None else account.charge
