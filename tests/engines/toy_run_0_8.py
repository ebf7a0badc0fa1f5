"""Runs the toy engine of vLLM 0.8.4 through a random program (``python toy_run_0_8.py JOB``) and
writes what it answered; with ENABLE_KVCACHED elastically, without it plain.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

import toy_engine_0_8 as toy
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.core_client import EngineCoreClient

from kvcached.config import Config
from kvcached.engines.vllm import identity
from kvcached.ledger import Ledger


def program(seed: int, requests: int) -> list[toy.Ask]:
    """Requests that share beginnings, come in bursts, and are given up now and then."""
    chance = random.Random(seed)
    roots = [[chance.randrange(3, 990) for _ in range(400)] for _ in range(4)]
    asks, step = [], 0
    for number in range(requests):
        root = chance.choice(roots)[: chance.randrange(0, 400)]
        prompt = [*root, number % 990 + 3, *chance.choices(range(3, 990), k=chance.randrange(90))]
        gives_up = chance.randrange(1, 20) if chance.random() < 0.1 else None
        asks.append(toy.Ask(step, prompt, chance.randrange(1, 70), gives_up))
        step += chance.choice([0, 0, 0, 1, 2, 40])
    return asks


def request(name: str, prompt: list[int], tokens: int) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=name,
        prompt=None,
        prompt_token_ids=prompt,
        mm_inputs=None,
        mm_hashes=None,
        mm_placeholders=None,
        sampling_params=SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True),
        eos_token_id=None,
        arrival_time=0.0,
        lora_request=None,
    )


def drive(core: Any, asks: list[toy.Ask], facts: dict[str, Any]) -> list[list[int]]:
    """Steps the engine until everything is answered."""
    answers: list[list[int]] = [[] for _ in asks]
    finished: dict[int, str] = {}
    step = coming = 0
    while len(finished) < len(asks):
        while coming < len(asks) and asks[coming].step <= step:
            core.add_request(request(str(coming), asks[coming].prompt, asks[coming].tokens))
            coming += 1
        for output in core.step().outputs:
            number = int(output.request_id)
            answers[number] += output.new_token_ids
            if output.finished:
                finished[number] = str(output.finish_reason)
        for number, ask in enumerate(asks):
            gives_up = ask.abort_after is not None and len(answers[number]) >= ask.abort_after
            if gives_up and number not in finished:
                core.abort_requests([str(number)])
                finished[number] = "given up"
                answers[number] = answers[number][: ask.abort_after]
        step += 1
        assert step < 50_000, "the engine does not end"
        facts["most_running"] = max(facts["most_running"], len(core.scheduler.running))
    facts["steps"] = step
    facts["reasons"] = [finished[number] for number in range(len(asks))]
    return answers


def count_preemptions(core: Any, facts: dict[str, Any]) -> None:
    """Real vLLM counts them in its statistics' events, which this client does not read."""
    free = core.scheduler.kv_cache_manager.free

    def counted(given: Any) -> None:
        facts["preemptions"] += given.status.name == "RUNNING"
        free(given)

    core.scheduler.kv_cache_manager.free = counted


def ledger_facts(core: Any) -> dict[str, int]:
    scheduler = core.scheduler
    snapshot = scheduler.ledgers[0].snapshot()
    account = snapshot.account(scheduler.instance)
    assert account is not None
    return {
        "charge": account.charge,
        "created": account.created,
        "page": account.page_bytes,
        "pinned": account.pinned,
        "hits": account.hits,
        "evictions": account.evictions,
        "high_water": snapshot.high_water,
        "capacity": snapshot.capacity,
        "used_blocks": scheduler.pages.blocks.used_blocks,
    }


def settle(core: Any) -> dict[str, int]:
    """After a reset of the prefix cache: memory goes back to the pinned page and a warm one."""
    core.reset_prefix_cache()
    assert core.scheduler.pages.blocks.cached_blocks == 0
    deadline = time.monotonic() + 5
    while True:
        facts = ledger_facts(core)
        if facts["created"] <= facts["pinned"] + facts["page"] or time.monotonic() > deadline:
            return facts
        time.sleep(0.01)


def run_cases(job: dict[str, Any]) -> list[dict[str, Any]]:
    results = []
    for case in job["cases"]:
        config = toy.make_config(
            job["model"], caching=case["caching"], window=case.get("window"), budget=case["budget"]
        )
        core = EngineCore(config, toy.Executor, log_stats=False)
        facts: dict[str, Any] = {"most_running": 0, "preemptions": 0}
        count_preemptions(core, facts)
        facts["answers"] = drive(core, program(case["seed"], case["requests"]), facts)
        facts["followers"] = sum(t.name == "kvcached-pressure" for t in threading.enumerate())
        if toy.elastic():
            core.scheduler.pages.check()
            facts["loaded"] = ledger_facts(core)
            facts["reset"] = settle(core)
            mapper = core.model_executor.driver_worker.worker.mapper
            facts["maps"] = mapper.arena.counters()["maps"]
        core.shutdown()
        core.shutdown()  # as with an engine's process and its finaliser
        results.append(facts)
    return results


def run_process(job: dict[str, Any]) -> dict[str, Any]:
    """The engine in a process of its own, as servers run it: the answers, and what an operator's
    limit takes from it while it is idle.
    """
    (case,) = job["cases"]
    config = toy.make_config(job["model"], caching=case["caching"], budget=case["budget"])
    client = EngineCoreClient.make_client(
        multiprocess_mode=True,
        asyncio_mode=False,
        vllm_config=config,
        executor_class=toy.ExecutorWithoutPlugins,
        log_stats=False,
    )
    asks = program(case["seed"], case["requests"])
    answers: list[list[int]] = [[] for _ in asks]
    for number, ask in enumerate(asks):
        client.add_request(request(str(number), ask.prompt, ask.tokens))
    left = len(asks)
    while left:
        for output in client.get_output().outputs:
            answers[int(output.request_id)] += output.new_token_ids
            left -= output.finished
    settings, instance = Config.from_env(), identity.of(config).instance
    with Ledger.open(settings.directory, settings.devices[0], create=False) as ledger:
        account = ledger.snapshot().account(instance)
        assert account is not None and account.owner_pid not in (None, os.getpid())
        before, limit = account.charge, 4 * account.page_bytes
        ledger.set_limit(instance, limit)
        deadline = time.monotonic() + 5
        while (now := ledger.snapshot().account(instance)) and now.charge > limit:
            assert time.monotonic() < deadline, f"{now.charge} of {before} bytes are left"
            time.sleep(0.01)
    client.shutdown()
    return {"answers": answers, "before": before, "limit": limit}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    found = run_process(job) if job.get("process") else run_cases(job)
    Path(job["answer"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
