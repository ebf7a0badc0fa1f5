"""One engine in a process of its own: builds it from a job, runs the job's work, writes a result.

The model has no weights to download: its shape is a ``config.json``, its weights are made here.
Weights as they are usually made up depend on the KV cache so little that an engine which lost it
would answer almost the same; these are large enough that attention decides (``sharpen``), and the
control runs, which lose some of the cache on purpose, show that it does.
"""

from __future__ import annotations

import json
import math
import os
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from turns import Turns

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Job:
    """What one engine is and does. ``elastic`` means with kvcached, in ``ledger`` (a folder)."""

    name: str
    model: str
    work: tuple[str, ...]
    elastic: bool = False
    ledger: str = ""
    runner: str = "V2"
    backend: str = "FLASH_ATTN"
    async_scheduling: bool | None = None  # None: as vLLM decides
    prefix_caching: bool = False
    max_seqs: int = 64
    max_tokens_a_step: int | None = None
    kv_bytes: int | None = 4 * GIB  # of a plain engine; None: as utilization says
    capacity_bytes: int | None = None  # of the ledger; None: the whole GPU
    utilization: float = 0.2
    loses: str = ""  # a control: "all" of the cache, or one "page" of it, is lost on the way
    batch_invariant: bool = False
    sharpen: bool = True
    warm_pages: int | None = None  # as many as that, no more and no less
    page_mib: int | None = None
    judges: tuple[str, ...] = ()  # jobs whose answers this engine judges (work "verdict")
    own_core: bool = False  # the engine's core in a process of its own, as under ``vllm serve``
    ranks: int = 1  # GPUs that share the model (tensor parallelism), each with a process of its own
    layout: str = "auto"  # KVCACHED_LAYOUT
    zero_holes: bool = False  # KVCACHED_UNMAPPED
    kv_dtype: str = "auto"
    block_tokens: int | None = None  # of vLLM's blocks; None: as vLLM decides
    kv_order: str = ""  # VLLM_KV_CACHE_LAYOUT: NHD or HND
    speculative: dict[str, Any] = field(default_factory=dict)
    compilation: dict[str, Any] = field(
        default_factory=lambda: {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    )
    ready_file: str = ""
    start_files: tuple[str, ...] = ()  # the work waits for these to appear, one before each
    hold_file: str = ""  # the engine stays, idle, until this appears
    plan: str = ""  # a file with load points of several models: the work "point-N" is one of them
    model_index: int = 0  # which of the models in the plan this engine is
    headroom: str = ""  # KVCACHED_HEADROOM
    sleep_mode: bool = False
    map_timeout_s: float | None = None  # KVCACHED_MAP_TIMEOUT
    turns: str = ""  # a file: models have the GPU one at a time, and sleep otherwise (``turns.py``)
    models: int = 1  # that take turns
    device: str = "gpu"  # or a host device, as ``host:NAME``: then everything runs on the CPU

    def environment(self) -> dict[str, str]:
        changes = {
            "VLLM_USE_V2_MODEL_RUNNER": "1" if self.runner == "V2" else "0",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if self.own_core else "0",
            "VLLM_BATCH_INVARIANT": "1" if self.batch_invariant else "0",
        }
        if self.on_host:
            changes["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        if self.kv_order:
            changes["VLLM_KV_CACHE_LAYOUT"] = self.kv_order
        if self.own_core or self.ranks > 1:
            changes["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # for ``sharpen``
        if self.elastic:
            changes |= {
                "ENABLE_KVCACHED": "true",
                "KVCACHED_DIR": self.ledger,
                "KVCACHED_NAME": self.name,
                "KVCACHED_LAYOUT": self.layout,
                "KVCACHED_UNMAPPED": "zero" if self.zero_holes else "hole",
            }
            if self.warm_pages is not None:
                changes["KVCACHED_WARM_LOW"] = changes["KVCACHED_WARM_HIGH"] = str(self.warm_pages)
            if self.page_mib is not None:
                changes["KVCACHED_PAGE_SIZE_MB"] = str(self.page_mib)
            if self.capacity_bytes is not None:
                changes["KVCACHED_CAPACITY"] = str(self.capacity_bytes)
            if self.map_timeout_s is not None:
                changes["KVCACHED_MAP_TIMEOUT"] = f"{self.map_timeout_s:g}"
            if self.headroom:
                changes["KVCACHED_HEADROOM"] = self.headroom
            if self.on_host:
                changes["KVCACHED_DEVICE"] = self.device
        return changes

    @property
    def on_host(self) -> bool:
        return self.device.startswith("host:")


def build(job: Job) -> Any:
    """The engine: vLLM's own ``LLM``, unmodified."""
    from vllm import LLM

    arguments: dict[str, Any] = {
        "model": job.model,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "float32" if job.on_host else "bfloat16",
        "seed": 0,
        "max_model_len": 4096,
        "max_num_seqs": job.max_seqs,
        "gpu_memory_utilization": job.utilization,
        "enable_prefix_caching": job.prefix_caching,
        "disable_log_stats": False,
        "kv_cache_dtype": job.kv_dtype,
        "tensor_parallel_size": job.ranks,
        # With NCCL: vLLM's own wants to look into the other GPU's memory, which not every
        # virtual machine allows.
        "disable_custom_all_reduce": job.ranks > 1,
    }
    if job.on_host:
        arguments["enforce_eager"] = True
    else:
        arguments["compilation_config"] = dict(job.compilation)
        arguments["attention_config"] = {"backend": job.backend}
    if job.sleep_mode:
        arguments["enable_sleep_mode"] = True
    if job.speculative:
        arguments["speculative_config"] = dict(job.speculative)
    if not job.elastic and job.kv_bytes is not None:
        arguments["kv_cache_memory_bytes"] = job.kv_bytes
    if job.turns and not job.on_host:
        arguments["enable_sleep_mode"] = True
    if job.block_tokens is not None:
        arguments["block_size"] = job.block_tokens
    if job.async_scheduling is not None:
        arguments["async_scheduling"] = job.async_scheduling
    if job.max_tokens_a_step is not None:
        arguments["max_num_batched_tokens"] = job.max_tokens_a_step
    llm = LLM(**arguments)
    if job.sharpen:
        llm.collective_rpc(sharpen)
    return llm


def take_turns(job: Job, llm: Any) -> Turns:
    """One of the models that have the GPU in turn, asleep. On a CPU nobody can sleep: there they
    only take turns.
    """
    from turns import Turns

    def sleep() -> None:
        if not job.on_host:
            import torch

            torch.cuda.synchronize()
            llm.sleep(level=1)

    def wake() -> None:
        if not job.on_host:
            llm.wake_up()

    sleep()
    return Turns(Path(job.turns), job.model_index, job.models, wake, sleep)


def sharpen(worker: Any) -> None:
    """Gives the model weights with which attention decides the next token: projections that keep
    the scale of what passes through them, and queries and keys large enough for sharp attention.
    The same for the same shape, whatever the order in which they are made.
    """
    import torch

    config = worker.model_config.hf_text_config
    queries, keys = config.num_attention_heads, config.num_key_value_heads
    seen = set()
    with torch.no_grad():
        for name, weight in worker.get_model().named_parameters():
            if weight.data_ptr() in seen:
                continue  # tied to one before
            seen.add(weight.data_ptr())
            if weight.dim() == 1:
                weight.fill_(1.0)
                continue
            generator = torch.Generator(device=weight.device)
            part = name if worker.rank == 0 else f"{name}, part {worker.rank}"
            generator.manual_seed(zlib.crc32(part.encode()))
            table = "embed" in name or "lm_head" in name
            scale = 0.3 if table else 1 / math.sqrt(weight.shape[1])
            weight.normal_(0.0, scale, generator=generator)
            if "qkv_proj" in name:
                values = weight.shape[0] * keys // (queries + 2 * keys)
                weight[: weight.shape[0] - values].mul_(2.5)


def lose(what: str) -> Callable[[Any], None]:
    """Zeroes a worker's KV cache (``all``) or the blocks that kvcached would have on its second
    page (``page``), or takes its fences away (``fence``).
    """
    import torch

    def forget(worker: Any) -> None:
        if what == "fence":
            # Fences on a stream without work are passed at once: pages go while they are in use.
            real, idle_stream = getattr(worker, "worker", worker), torch.cuda.Stream()
            real._stream = lambda: int(idle_stream.cuda_stream)
            return
        for cache in worker.model_runner.kv_caches:
            (cache if what == "all" else cache[16:32]).zero_()

    return forget


def facts(llm: Any) -> dict[str, Any]:
    """What vLLM made of the arguments."""
    config = llm.llm_engine.vllm_config
    shape = llm.collective_rpc(_tensor_facts)[0]
    return {
        "async_scheduling": config.scheduler_config.async_scheduling,
        "scheduler": str(config.scheduler_config.get_scheduler_cls().__qualname__),
        "v2_runner": config.use_v2_model_runner,
        "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
        "blocks": config.cache_config.num_gpu_blocks,
        "block_tokens": config.cache_config.block_size,
        **shape,
    }


def _tensor_facts(worker: Any) -> dict[str, Any]:
    caches = worker.model_runner.kv_caches
    mapper = getattr(worker, "mapper", None)
    return {
        "runner": type(worker.model_runner).__module__,
        "worker": type(worker).__qualname__,
        "shape": list(caches[0].shape),
        "strides": list(caches[0].stride()),
        "layer_distance": caches[1].data_ptr() - caches[0].data_ptr() if len(caches) > 1 else 0,
        "page_bytes": mapper.layout.page_bytes if mapper is not None else 0,
        "regions": len(mapper.layout.regions) if mapper is not None else 0,
        "zero_bytes": mapper.arena.zero_bytes() if mapper is not None else 0,
        "arena": mapper.arena.counters() if mapper is not None else {},
    }


def note_commands(worker: Any) -> list[list[float]]:
    """From now on, what steps have mapped and unmapped, and how long they waited for it: rows of
    the end on the monotonic clock, seconds, pages to unmap, to map, and to map ahead. The list
    grows in this process.
    """
    rows: list[list[float]] = []
    mapper = getattr(worker, "mapper", None)
    if mapper is None:
        return rows
    apply = mapper.apply

    def noted(commands: Any, stream: int = 0) -> None:
        begun = time.monotonic()
        apply(commands, stream)
        end = time.monotonic()
        sizes = len(commands.unmap), len(commands.map), len(commands.ahead)
        rows.append([end, end - begun, *map(float, sizes)])

    mapper.apply = noted
    return rows


def gpu_used_bytes() -> int:
    """What is in use on this process's GPU, by everybody."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def ledger_facts(job: Job) -> list[dict[str, Any]]:
    """The numbers of each device's ledger for this engine and for all."""
    from kvcached.config import Config
    from kvcached.engines.vllm import device

    config = Config.from_env()
    return [
        _of_one_ledger(job, config.directory, one.name)
        for one in device.of(config, job.ranks).distinct
    ]


def _of_one_ledger(job: Job, directory: Path, device: str) -> dict[str, Any]:
    from kvcached.ledger import Ledger

    with Ledger.open(directory, device, create=False, read_only=True) as ledger:
        seen = ledger.snapshot()
    account = seen.account(job.name)
    assert account is not None
    return {
        "device": seen.device,
        "capacity": seen.capacity,
        "headroom": seen.headroom,
        "foreign": seen.foreign,
        "high_water": seen.high_water,
        "charge": account.charge,
        "created": account.created,
        "cached": account.cached,
        "warm": account.warm,
        "page": account.page_bytes,
        "refused": account.refused,
        "reclaimed": account.reclaimed,
    }


def run(job: Job, folder: Path) -> None:
    """Builds the engine and does the work; results in ``folder/NAME.json`` at each step."""
    from points import play_point
    from sleep_work import WORK as SLEEPING
    from workloads import WORK, is_numbered, numbered, verdict

    result: dict[str, Any] = {"name": job.name, "ok": False, "work": {}}

    def save() -> None:
        part = folder / f"{job.name}.part"
        part.write_text(json.dumps(result))
        part.rename(folder / f"{job.name}.json")

    start = time.monotonic()
    llm = build(job)
    result |= {"start_s": round(time.monotonic() - start, 2), "facts": facts(llm)}
    # Whether the engine's CUDA context is this process's.
    here = not job.own_core and job.ranks == 1 and not job.on_host
    result["used_idle_bytes"] = gpu_used_bytes() if here else 0
    commands = llm.collective_rpc(note_commands)[0] if here else []
    turns = take_turns(job, llm) if job.turns else None
    save()
    if job.ready_file:
        Path(job.ready_file).touch()
    for index, name in enumerate(job.work):
        if index < len(job.start_files):
            _wait_for(job.start_files[index])
        if name == "verdict":
            result["work"][name] = {
                each: verdict(llm, folder / f"{each}.json") for each in job.judges
            }
        elif name.startswith("point-"):
            files = Path(job.plan), job.model_index, Path(job.start_files[index])
            result["work"][name] = play_point(llm, *files, turns)
        elif (part := name.partition("-")[0]) in SLEEPING and job.sleep_mode:
            result["work"][name] = SLEEPING[part](llm, None)
        elif is_numbered(name):
            result["work"][name] = numbered(llm, name)
        else:
            result["work"][name] = WORK[name](llm, lose(job.loses) if job.loses else None)
        result["work"][name]["commands"] = list(commands)
        commands.clear()
        save()
    time.sleep(1.5)  # an idle engine gives back
    result["preemptions"] = sum(
        m.value for m in llm.get_metrics() if m.name.startswith("vllm:num_preemptions")
    )
    result["drafted"], result["accepted"] = (
        sum(m.value for m in llm.get_metrics() if m.name == f"vllm:spec_decode_num_{what}_tokens")
        for what in ("draft", "accepted")
    )
    result["arena"] = llm.collective_rpc(_tensor_facts)[0]["arena"]
    if job.elastic:
        result["ledgers"] = ledger_facts(job)
    result["used_end_bytes"] = gpu_used_bytes() if here else 0
    result["ok"] = True
    save()
    if job.hold_file:
        _wait_for(job.hold_file)
    if job.ranks > 1:
        llm.llm_engine.engine_core.shutdown()  # ends the ranks' processes


def _wait_for(path: str) -> None:
    while not os.path.exists(path):
        time.sleep(0.02)
