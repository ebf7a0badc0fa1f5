"""The three configurations that play the same load.

* elastic: both engines with kvcached on, one budget for the two of them.
* static: both engines plain, each with a KV cache of half the budget.
* reference: both engines plain, each with a KV cache of the whole budget; what the outputs must
  equal, and what one engine's speed is compared with.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from kvcached.demo.models import Model
from kvcached.demo.servers import EngineSpec
from kvcached.demo.trace import LoadShape
from kvcached.units import MIB

BLOCK_TOKENS = 32
MAX_MODEL_TOKENS = 1024
DEFAULT_BUDGET = 224 * MIB


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line decides."""

    out: Path
    budget_bytes: int = DEFAULT_BUDGET
    prefix_caching: bool = True
    runs: int = 1
    fast: bool = False
    shape: LoadShape = LoadShape()
    overhead_pairs: int = 1
    overhead_requests: int = 12  # fit half of the budget, so that only speed counts

    @property
    def device(self) -> str:
        return f"host:demo-{os.getpid()}"

    @property
    def ledger_directory(self) -> Path:
        return (self.out / "ledger").resolve()


@dataclass(frozen=True, slots=True)
class Setup:
    """One configuration: its name, what it is in words, its engines."""

    name: str
    title: str
    specs: tuple[EngineSpec, ...]


def elastic(options: Options, models: dict[str, Model]) -> Setup:
    environment = {
        "ENABLE_KVCACHED": "true",
        "KVCACHED_DEVICE": options.device,
        "KVCACHED_CAPACITY": str(options.budget_bytes),
        "KVCACHED_DIR": str(options.ledger_directory),
    }
    specs = tuple(
        _spec("elastic", options, name, model, [], {**environment, "KVCACHED_NAME": name})
        for name, model in models.items()
    )
    return Setup("elastic", "two engines share the budget (kvcached)", specs)


def static(options: Options, models: dict[str, Model]) -> Setup:
    return _plain("static", "each engine owns half of the budget", options, models, 2)


def reference(options: Options, models: dict[str, Model]) -> Setup:
    return _plain("reference", "plain engines with a whole budget each", options, models, 1)


def _plain(
    name: str, title: str, options: Options, models: dict[str, Model], divisor: int
) -> Setup:
    size = ["--kv-cache-memory-bytes", str(options.budget_bytes // divisor)]
    specs = tuple(_spec(name, options, key, model, size, {}) for key, model in models.items())
    return Setup(name, title, specs)


def _spec(
    setup: str,
    options: Options,
    name: str,
    model: Model,
    extra: list[str],
    environment: dict[str, str],
) -> EngineSpec:
    caching = "--enable-prefix-caching" if options.prefix_caching else "--no-enable-prefix-caching"
    arguments = ["--dtype", "float32", "--enforce-eager", caching]
    arguments += ["--max-model-len", str(MAX_MODEL_TOKENS), "--block-size", str(BLOCK_TOKENS)]
    arguments += ["--max-num-seqs", "128", *extra]
    log = options.out / f"{setup}-{name}.log"
    return EngineSpec(name, model, tuple(arguments), environment, log)
