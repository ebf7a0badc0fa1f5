"""An ``LLM`` in a process of its own, driven by one JSON document (``python llm_process.py JOB``).

The job says what to build and to generate; the answer goes into a file next to it. Without
ENABLE_KVCACHED this is plain vLLM, which is what the outputs are compared with.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ARENAS: list[Any] = []


def remember_arenas() -> None:
    """The mappers of this process, for what only the inside can say."""
    from kvcached.cache import PageMapper

    original = PageMapper.__init__

    def __init__(self: PageMapper, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        ARENAS.append(self.arena)

    PageMapper.__init__ = __init__


def generate(llm: Any, job: dict[str, Any]) -> list[list[int]]:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in job["prompts"]]
    sampling = SamplingParams(
        temperature=0, max_tokens=job["max_tokens"], ignore_eos=True, detokenize=False
    )
    return [
        list(answer.outputs[0].token_ids)
        for answer in llm.generate(prompts, sampling, use_tqdm=False)
    ]


def preemptions(llm: Any) -> int:
    return sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")


def ledger_facts() -> dict[str, int]:
    """This engine's numbers (the only scheduled account's, where it has no name), and what the
    kernel says about the memory behind them. Of an engine on several devices, the sums.
    """
    from kvcached.config import Config
    from kvcached.demo.sampler import SessionWatch

    config = Config.from_env()
    on_each = [device_facts(config.directory, device, config.name) for device in config.devices]
    facts = {key: sum(facts[key] for facts in on_each) for key in on_each[0]}
    return {**facts, "physical": SessionWatch(os.getsid(0)).physical_bytes()}


def device_facts(directory: Path, device: str, name: str | None) -> dict[str, int]:
    from kvcached.ledger import Ledger

    with Ledger.open(directory, device, create=False, read_only=True) as ledger:
        snapshot = ledger.snapshot()
        scheduled = (each for each in snapshot.accounts if each.owner_pid is not None)
        (account,) = (each for each in scheduled if name in (None, each.name))
        return {
            "charge": account.charge,
            "created": account.created,
            "cached": account.cached,
            "page": account.page_bytes,
            "pinned": account.pinned,
            "hits": account.hits,
            "misses": account.misses,
            "evictions": account.evictions,
            "block_tokens": account.block_tokens,
            "block_bytes": account.block_bytes,
            "high_water": snapshot.high_water,
            "capacity": snapshot.capacity,
            "asleep": account.asleep,
        }


def build(job: dict[str, Any]) -> Any:
    from vllm import LLM

    return LLM(
        job["model"],
        dtype="float32",
        max_model_len=1024,
        enforce_eager=True,
        skip_tokenizer_init=True,
        block_size=32,
        disable_log_stats=False,
        **job["arguments"],
    )


def equality(job: dict[str, Any]) -> dict[str, Any]:
    """Everything twice, so that the second round meets the first one's prefixes."""
    llm = build(job)
    result: dict[str, Any] = {"outputs": [generate(llm, job) for _ in range(job["rounds"])]}
    result["preemptions"] = preemptions(llm)
    if os.environ.get("ENABLE_KVCACHED"):
        result["loaded"] = ledger_facts()
        assert llm.reset_prefix_cache()
        deadline = time.monotonic() + 5
        while True:
            result["reset"] = facts = ledger_facts()
            small = facts["charge"] <= facts["pinned"] + facts["page"]
            if (small and facts["physical"] == facts["created"]) or time.monotonic() > deadline:
                break
            time.sleep(0.02)
    if job.get("stay"):  # idle, with cached prefixes, until it is killed
        generate(llm, job)
        answer(job, result)
        signal.pause()
    return result


def until_it_dies(job: dict[str, Any]) -> dict[str, Any]:
    """Generates until the engine has died; what its caller was told."""
    llm = build(job)
    answer(job, {"error": None})
    while True:
        try:
            generate(llm, job)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer
            return {"error": type(error).__name__}


def several(job: dict[str, Any]) -> dict[str, Any]:
    """The same of engines of different kinds, one after the other: an import serves them all."""
    results = {}
    if os.environ.get("ENABLE_KVCACHED"):
        remember_arenas()
    for kind, changes in job["engines"].items():
        os.environ.update(changes.get("environment", {}))
        own = {**job, **changes, "rounds": 1}
        llm = build(own)
        result: dict[str, Any] = {"outputs": generate(llm, own), "preemptions": preemptions(llm)}
        if os.environ.get("ENABLE_KVCACHED"):
            result["loaded"] = ledger_facts()
            result["mapped"] = ARENAS[-1].counters()["maps"]
        llm.llm_engine.engine_core.shutdown()
        for name in changes.get("environment", {}):
            del os.environ[name]
        del llm
        results[kind] = result
        answer(job, results)
    return results


def no_maps(job: dict[str, Any]) -> dict[str, Any]:
    """Generates with the map commands suppressed, from the start or after a first short answer;
    does not come back.
    """
    import ctypes

    from kvcached.cache import PageMapper

    remember_arenas()
    if not job["after_the_first"]:
        PageMapper.apply = lambda self, commands, stream=0: None
    llm = build(job)
    if job["after_the_first"]:
        generate(llm, {"prompts": [[5, 6, 7]], "max_tokens": 1})
        PageMapper.apply = lambda self, commands, stream=0: None
    (arena,) = ARENAS
    print(f"reservation {arena.address:#x} {arena.size:#x}", flush=True)
    ctypes.CDLL(job["report_faults"]).report_faults()
    return {"outputs": [generate(llm, job)]}


def fork(job: dict[str, Any]) -> dict[str, Any]:
    """Forks children of both kinds, goes on generating, and is then killed by the test."""
    import multiprocessing

    llm = build(job)
    before = generate(llm, job)
    short = os.fork()
    if short == 0:
        sys.exit(0)  # with destructors and exit handlers
    os.waitpid(short, 0)
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    worker.start()
    long = os.fork()
    if long == 0:
        signal.pause()
    after = generate(llm, job)
    facts = ledger_facts()
    answer(job, {"outputs": [before, after], "children": [worker.pid, long], "loaded": facts})
    signal.pause()
    return {}


class PlayedWeights:
    """What a CPU lacks of sleep mode: weights that leave and come back."""

    asleep = False
    refusal = ""
    log: list[str]

    def __init__(self) -> None:
        self.log = []

    @contextlib.contextmanager
    def leaving(self, level: int) -> Iterator[None]:
        self.log.append(f"leave {level}")
        yield
        self.asleep = True

    def make_room(self, tags: list[str] | None) -> None:
        from kvcached.errors import OutOfMemoryError

        self.log.append(f"room {tags}")
        if self.refusal:
            raise OutOfMemoryError(self.refusal)

    def leave_room(self) -> None:
        self.log.append("leave room")

    @contextlib.contextmanager
    def coming(self, tags: list[str] | None, runner: Any) -> Iterator[None]:
        self.log.append(f"come {tags}")
        yield
        self.asleep = tags == ["weights"]


def asleep(job: dict[str, Any]) -> dict[str, Any]:
    """Sleeps and wakes; where a step came while it sleeps, the worker would raise."""
    from kvcached.engines.vllm.worker import ElasticWorker

    llm = build(job)
    result: dict[str, Any] = {"before": generate(llm, job), "loaded": ledger_facts()}
    try:
        llm.sleep(1)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer
        result["without sleep mode"] = [type(error).__name__, str(error), is_asleep(llm)]
    played = PlayedWeights()
    ElasticWorker._weights = played  # type: ignore[assignment]
    engine = llm.llm_engine.engine_core.engine_core
    engine.model_executor.model_config.enable_sleep_mode = True
    for level, tags in ((1, [None]), (2, [["weights"], ["kv_cache"]])):
        result[f"again {level}"] = generate(llm, job)
        llm.sleep(level)
        result[f"asleep {level}"] = [is_asleep(llm), ledger_facts()]
        result[f"waited {level}"] = ask_while_asleep(llm, job)
        played.refusal = "there is no room"
        try:
            llm.wake_up()
        except Exception as error:  # noqa: BLE001
            result[f"refused {level}"] = [type(error).__name__, str(error), is_asleep(llm)]
        played.refusal = ""
        states = []
        for each in tags:
            llm.wake_up(each)
            states.append(is_asleep(llm))
        result[f"states {level}"] = states
        result[f"answer {level}"] = finish(llm)
    result["after"] = generate(llm, job)
    result["log"] = played.log
    return result


def is_asleep(llm: Any) -> bool:
    return bool(llm.llm_engine.engine_core.engine_core.is_sleeping())


def ask_while_asleep(llm: Any, job: dict[str, Any]) -> bool:
    """A request, pressure from an operator, and time: whether the request waited."""
    from vllm import SamplingParams

    from kvcached.config import Config
    from kvcached.ledger import Ledger

    engine, config = llm.llm_engine, Config.from_env()
    params = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True)
    params.detokenize = False
    engine.add_request("waits", {"prompt_token_ids": job["prompts"][0]}, params)
    with Ledger.open(config.directory, config.devices[0], create=False) as ledger:
        (account,) = ledger.snapshot().accounts
        ledger.ask_back(account.instance, account.charge)
    outputs = []
    for _ in range(50):
        outputs += engine.step()
        time.sleep(0.01)
    return outputs == [] and bool(engine.has_unfinished_requests())


def burst(job: dict[str, Any]) -> dict[str, Any]:
    """Requests reach an engine at rest, and no step is made: what has been mapped for them by
    then. Then all of them are taken back, and then they are asked for in earnest.
    """
    from vllm import SamplingParams

    llm = build(job)
    engine = llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True)
    params.detokenize = False
    created = []
    for number, prompt in enumerate(job["prompts"]):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
        created.append(settled()["created"])
    engine.abort_request([str(number) for number in range(len(job["prompts"]))])
    rest = 2 * ledger_facts()["page"]  # the pinned page and a warm one
    result: dict[str, Any] = {"created": created, "aborted": settled(rest)}
    return {**result, "outputs": generate(llm, job)}


def lockstep(job: dict[str, Any]) -> dict[str, Any]:
    """Of each step with commands: the pages that it needs and that were not sent for before."""
    llm = build(job)
    pages = llm.llm_engine.engine_core.engine_core.scheduler.pages
    take, ahead, late = pages.take_commands, set(), []

    def noted(*args: Any, **kwargs: Any) -> Any:
        commands = take(*args, **kwargs)
        if commands is not None:
            late.append(len({*commands.map} - ahead))
            ahead.difference_update(commands.map, commands.unmap)
            ahead.update(commands.ahead)
        return commands

    pages.take_commands = noted
    outputs = generate(llm, job)
    return {"late": late, "outputs": outputs, "ahead": pages.counters.mapped_ahead}


def settled(most: float = float("inf")) -> dict[str, int]:
    """The engine's numbers once as much exists as is charged, and no more than so many bytes,
    wherever its workers map them.
    """
    end_s = time.monotonic() + 20
    while (facts := ledger_facts())["created"] != facts["charge"] or facts["charge"] > most:
        if time.monotonic() > end_s:
            raise TimeoutError(f"it does not settle: {facts}")
        time.sleep(0.01)
    return facts


def finish(llm: Any) -> list[int]:
    outputs: list[Any] = []
    while llm.llm_engine.has_unfinished_requests():
        outputs += llm.llm_engine.step()
    return list(outputs[-1].outputs[0].token_ids)


def ends(job: dict[str, Any]) -> dict[str, Any]:
    """How answers end; while they run, the engine gets a limit of so many pages."""
    import threading

    from kvcached import open_pool

    def lower() -> None:
        with open_pool() as pool:
            while pool.instance("llm").in_use < job["above"] * pool.instance("llm").page_bytes:
                time.sleep(0.005)
            pool.set_limit("llm", job["limit"] * pool.instance("llm").page_bytes, wait_s=0)

    llm = build(job)
    threading.Thread(target=lower, daemon=True).start()
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in job["prompts"]]
    sampling = [
        SamplingParams(temperature=0, max_tokens=most, ignore_eos=True, detokenize=False)
        for most in job["max_tokens"]
    ]
    found = [each.outputs[0] for each in llm.generate(prompts, sampling, use_tqdm=False)]
    return {"ends": [(len(each.token_ids), each.finish_reason, each.stop_reason) for each in found]}


def answer(job: dict[str, Any], result: dict[str, Any]) -> None:
    target = Path(job["answer"])
    target.with_suffix(".part").write_text(json.dumps(result))
    target.with_suffix(".part").rename(target)


TASKS = {
    task.__name__: task
    for task in (equality, several, no_maps, fork, ends, until_it_dies, asleep, burst, lockstep)
}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    answer(job, TASKS[job["task"]](job))


if __name__ == "__main__":
    main()
