"""The work of engines that sleep (``sleep.py``): requests whose answers are compared, sleeping,
waking, and filling a GPU with cached prefixes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import Any

from workloads import Ask, play

GIB = 1 << 30
Work = Callable[[Any, Any], dict[str, Any]]


def ask(llm: Any, _: Any) -> dict[str, Any]:
    """32 requests of 300 tokens in and 64 out, all at once: the same each time."""
    draw = random.Random("ask")
    asks = [Ask([draw.randrange(10, 120_000) for _ in range(300)], 64) for _ in range(32)]
    told = play(llm, asks)
    return {"tokens": told["tokens"], "seconds": told["seconds"], "ttft_s": told["ttft_p50_s"]}


def sleep(level: int) -> Work:
    def work(llm: Any, _: Any) -> dict[str, Any]:
        before, start = used_bytes(), time.monotonic()
        llm.sleep(level=level)
        took = time.monotonic() - start
        return {
            "seconds": took,
            "asleep": llm.llm_engine.is_sleeping(),
            "freed_gib": (before - used_bytes()) / GIB,
            **ledger_gib(),
        }

    return work


def wake(llm: Any, _: Any) -> dict[str, Any]:
    """After level 1."""
    before, start = ledger_gib(), time.monotonic()
    llm.wake_up()
    took = time.monotonic() - start
    return {"seconds": took, "asleep": llm.llm_engine.is_sleeping(), "before": before}


def wake_anew(llm: Any, _: Any) -> dict[str, Any]:
    """After level 2: the weights' memory, the weights as they were made first (where there is a
    checkpoint, vLLM would read it), and the rest.
    """
    from engine import sharpen

    before, start = ledger_gib(), time.monotonic()
    llm.wake_up(tags=["weights"])
    mapped = time.monotonic()
    half_awake = llm.llm_engine.is_sleeping()
    llm.collective_rpc(sharpen)
    used_bytes()  # as good as a wait for the device: it answers when it is done
    made = time.monotonic()
    llm.wake_up(tags=["kv_cache"])
    return {
        "seconds": time.monotonic() - start,
        "mapped_s": mapped - start,
        "made_s": made - mapped,
        "asleep": llm.llm_engine.is_sleeping(),
        "half_asleep": half_awake,
        "before": before,
    }


def wake_refused(llm: Any, _: Any) -> dict[str, Any]:
    """Somebody has the memory and does not give it: it must fail in time, with the numbers."""
    start, said = time.monotonic(), ""
    try:
        llm.wake_up()
    except MemoryError as error:  # kvcached's OutOfMemoryError is one
        said = str(error)
    return {
        "seconds": time.monotonic() - start,
        "said": said,
        "asleep": llm.llm_engine.is_sleeping(),
    }


def flood(llm: Any, _: Any) -> dict[str, Any]:
    """Prompts until all memory that can be leased holds their cached prefixes."""
    start, draw, batches = time.monotonic(), random.Random(time.monotonic()), 0
    while batches < 24 and ledger_gib()["free_gib"] > 0.75:
        play(llm, [Ask([draw.randrange(10, 120_000) for _ in range(3000)], 2) for _ in range(24)])
        batches += 1
    return {"seconds": time.monotonic() - start, "batches": batches, **ledger_gib()}


def used_bytes() -> int:
    """What is in use on this process's GPU, by everybody."""
    import torch

    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def ledger_gib() -> dict[str, float]:
    """What the ledger says of the GPU: what is free, foreign, and each engine's charge."""
    from kvcached.config import Config
    from kvcached.engines.vllm import device
    from kvcached.ledger import Ledger

    config = Config.from_env()
    (one,) = device.of(config).distinct
    with Ledger.open(config.directory, one.name, create=False, read_only=True) as ledger:
        seen = ledger.snapshot()
    return {
        "free_gib": seen.free / GIB,
        "foreign_gib": seen.foreign / GIB,
        **{f"kv_{account.name}_gib": account.charge / GIB for account in seen.accounts},
    }


# A name's part before the first dash is what is done; the rest tells one time from another.
WORK: Mapping[str, Work] = {
    "ask": ask,
    "sleep1": sleep(1),
    "sleep2": sleep(2),
    "wake": wake,
    "wakeanew": wake_anew,
    "wakerefused": wake_refused,
    "flood": flood,
}
