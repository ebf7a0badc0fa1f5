"""An SGLang engine in a process of its own, driven by one JSON document
(``python engine_process.py JOB``).

The job says what to build and to generate; the answer goes into a file next to it. Without
ENABLE_KVCACHED this is plain SGLang, which is what the outputs are compared with.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def build(job: dict[str, Any]) -> Any:
    import sglang

    arguments = {
        "model_path": job["model"],
        "device": "cpu",
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "disable_cuda_graph": True,
        "context_length": 1024,
        "mem_fraction_static": 0.1,
        "log_level": "info",
        **job["arguments"],
    }
    engine = sglang.Engine(**arguments)
    if sglang.__version__.startswith("0.4"):  # it expects a loop in the caller's thread
        asyncio.set_event_loop(asyncio.new_event_loop())
    return engine


def generate(engine: Any, job: dict[str, Any]) -> list[list[int]]:
    sampling = {"temperature": 0, "max_new_tokens": job["max_tokens"], "ignore_eos": job["long"]}
    answers = engine.generate(input_ids=job["prompts"], sampling_params=sampling)
    return [list(each.get("output_ids") or each["token_ids"]) for each in answers]


def ledger_facts() -> dict[str, int]:
    """This engine's numbers, and what the kernel says about the memory behind them. Of an engine on
    several devices, the sums.
    """
    from kvcached.config import Config
    from kvcached.demo.sampler import SessionWatch

    config = Config.from_env()
    on_each = [device_facts(config.directory, each, config.name or "") for each in config.devices]
    facts = {key: sum(facts[key] for facts in on_each) for key in on_each[0]}
    return {**facts, "physical": SessionWatch(os.getsid(0)).physical_bytes()}


def device_facts(directory: Path, device: str, name: str) -> dict[str, int]:
    from kvcached.ledger import Ledger

    with Ledger.open(directory, device, create=False, read_only=True) as ledger:
        snapshot = ledger.snapshot()
        account = snapshot.account(name)
    assert account is not None
    return {
        "charge": account.charge,
        "created": account.created,
        "cached": account.cached,
        "in_use": account.in_use,
        "page": account.page_bytes,
        "pinned": account.pinned,
        "hits": account.hits,
        "misses": account.misses,
        "evictions": account.evictions,
        "block_tokens": account.block_tokens,
        "high_water": snapshot.high_water,
        "capacity": snapshot.capacity,
    }


def settled(done: Any, limit_s: float = 10.0) -> dict[str, int]:
    """The facts as soon as they are as expected, or as they are at the limit."""
    deadline = time.monotonic() + limit_s
    while True:
        facts = ledger_facts()
        if (done(facts) and facts["physical"] == facts["created"]) or time.monotonic() > deadline:
            return facts
        time.sleep(0.02)


def flushed(engine: Any) -> bool:
    """Flushes the cache. SGLang refuses while the last step's requests are not cleared away."""
    deadline = time.monotonic() + 10
    while not (done := engine.flush_cache().success) and time.monotonic() < deadline:
        time.sleep(0.1)
    return bool(done)


def equality(job: dict[str, Any]) -> None:
    """Everything twice, so that the second round meets the first one's prefixes."""
    engine = build(job)
    result: dict[str, Any] = {"outputs": [generate(engine, job) for _ in range(job["rounds"])]}
    if os.environ.get("ENABLE_KVCACHED"):
        result["loaded"] = settled(lambda facts: True)
        assert flushed(engine)
        result["reset"] = settled(lambda facts: facts["charge"] <= facts["pinned"] + facts["page"])
    if job.get("stay"):  # idle, with cached prefixes, until it is killed
        generate(engine, job)
        answer(job, result)
        signal.pause()
    answer(job, result)
    engine.shutdown()


def bursts(job: dict[str, Any]) -> None:
    engine = build(job)
    serve_bursts(job, lambda: generate(engine, job))


def serve_bursts(job: dict[str, Any], generated: Callable[[], list[list[int]]]) -> None:
    """Generates whenever a file of that number appears and says so in its answer, until it is
    killed.
    """
    folder = Path(job["answer"]).parent
    result: dict[str, Any] = {"outputs": []}
    answer(job, result)
    while True:
        if (folder / f"burst-{len(result['outputs'])}").exists():
            result["outputs"].append(generated())
            answer(job, result)
        time.sleep(0.02)


def answer(job: dict[str, Any], result: dict[str, Any]) -> None:
    target = Path(job["answer"])
    target.with_suffix(".part").write_text(json.dumps(result))
    target.with_suffix(".part").rename(target)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    {"equality": equality, "bursts": bursts}[job["task"]](job)


if __name__ == "__main__":
    main()
