#!/usr/bin/env python3
"""Does an SGLang engine with kvcached on a GPU say what a plain one says, and transformers?

Everything is in float32, so that transformers can judge: an engine that lost some of its KV cache
says something else, as the weights are such that attention decides. Batches of two engines differ
where memory is short, and with them the rounding: an answer may take another turn where the two
likeliest tokens are as good as equal to transformers (``TIE``), and is then counted as a tie. See
README.md for what to set up; ``sglang_pack.py`` makes what a machine without a package index needs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [[(i * 7 + j * 13) % 990 + 5 for j in range(40 + 8 * i)] for i in range(48)]
MAX_TOKENS = 48
JOB_LIMIT_S = 240
TIE = 1e-3  # of a logit; they spread over several units
# Each layer has 4096 slots on a page of each of its tensors: 16 MiB a page. All requests and their
# answers take 13,248 slots.
VIRTUAL = 256 * MIB
ROOMY = 256 * MIB
TIGHT = 32 * MIB
ERROR_LINES = 40


@dataclass(frozen=True, slots=True)
class Case:
    """An engine with kvcached. Less than ``ROOMY`` does not hold all requests at once."""

    name: str
    capacity: int = ROOMY
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


CASES = (
    Case("roomy"),
    Case("tight", TIGHT),
    Case("tight-no-radix", TIGHT, {"disable_radix_cache": True}),
    Case("tight-paged", TIGHT, {"page_size": 16}),
    Case("tight-paged-64", TIGHT, {"page_size": 64}),
    Case("tight-paged-no-radix", TIGHT, {"page_size": 16, "disable_radix_cache": True}),
    Case("tight-chunked", TIGHT, {"chunked_prefill_size": 128}),
    Case("tight-no-overlap", TIGHT, {"disable_overlap_schedule": True}),
    # Its zeros are pinned, too, and take 2 MiB: a second page would not fit into TIGHT.
    Case("zero", 48 * MIB, {}, {"KVCACHED_UNMAPPED": "zero"}),
    Case("together", TIGHT, {}, {"KVCACHED_LAYOUT": "block"}),
    Case(
        "graphs",
        TIGHT,
        {
            "disable_cuda_graph": False,
            "disable_prefill_cuda_graph": True,
            "cuda_graph_max_bs_decode": 16,
        },
    ),
)


def engine(job: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: everything twice, so that the second round meets the first one's
    prefixes; then what is left when the engine is idle and its cache is flushed.
    """
    import sglang
    import torch

    arguments = {
        "model_path": job["model"],
        "device": "cuda",
        "attention_backend": "triton",
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "disable_cuda_graph": True,
        "context_length": 1024,
        "mem_fraction_static": 0.2,
        "log_level": "info",
        **job["arguments"],
    }
    built = sglang.Engine(**arguments)
    sampling = {"temperature": 0, "max_new_tokens": MAX_TOKENS, "ignore_eos": True}
    result: dict[str, Any] = {"outputs": []}
    start = time.monotonic()
    for _ in range(2):
        answers = built.generate(input_ids=PROMPTS, sampling_params=sampling)
        result["outputs"].append([list(answer["output_ids"]) for answer in answers])
    result["seconds"] = time.monotonic() - start
    if os.environ.get("ENABLE_KVCACHED"):
        result["loaded"] = facts()
        # SGLang refuses while the last step's requests are not cleared away.
        result["flushed"] = wait_for(lambda: bool(built.flush_cache().success))
        wait_for(lambda: at_rest(facts()))
        result["reset"] = facts()
    result["free_mib"] = torch.cuda.mem_get_info()[0] // MIB
    built.shutdown()
    return result


def wait_for(done: Callable[[], bool], limit_s: float = 10.0) -> bool:
    deadline = time.monotonic() + limit_s
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def at_rest(numbers: dict[str, int]) -> bool:
    """Whether an engine holds no more than its pinned page and one warm page."""
    return numbers["charge"] <= numbers["pinned"] + numbers["page"]


def facts() -> dict[str, int]:
    from kvcached import nvml
    from kvcached.config import Config
    from kvcached.ledger import Ledger

    device = nvml.visible_uuid(0, os.environ.get("CUDA_VISIBLE_DEVICES"))
    with Ledger.open(Config.from_env().directory, device, create=False, read_only=True) as ledger:
        snapshot = ledger.snapshot()
        (account,) = snapshot.accounts
    numbers = {name: getattr(account, name) for name in ("charge", "created", "cached", "pinned")}
    numbers |= {name: getattr(account, name) for name in ("hits", "misses", "evictions")}
    return {**numbers, "page": account.page_bytes, "high_water": snapshot.high_water}


def transformers_say(model: str) -> dict[str, list[Any]]:
    """Each answer, and for each of its tokens how far the second likeliest is below it."""
    import torch
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    )
    found = found.eval().cuda()
    found.generation_config.eos_token_id = None
    answers: dict[str, list[Any]] = {"tokens": [], "gaps": []}
    for prompt in PROMPTS:
        ids = torch.tensor([prompt], device="cuda")
        more = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "do_sample": False}
        more |= {"return_dict_in_generate": True, "output_logits": True}
        out = found.generate(ids, max_new_tokens=MAX_TOKENS, **more)
        best = torch.cat(out.logits).float().topk(2).values
        answers["tokens"].append(out.sequences[0, len(prompt) :].tolist())
        answers["gaps"].append((best[:, 0] - best[:, 1]).tolist())
    return answers


def run(job: dict[str, Any], out: Path, environment: dict[str, str], limit_s: float) -> Any:
    """One job in processes of its own; None where it failed, with the first error printed."""
    answer, log = out / f"{job['name']}.json", out / f"{job['name']}.log"
    answer.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--job", json.dumps(job), "--out", str(answer)]
    start = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = str(process.wait(max(1.0, min(JOB_LIMIT_S, limit_s))))
        except subprocess.TimeoutExpired:
            status = "out of time"
        _end_session(process)
    if status == "0" and answer.exists():
        return json.loads(answer.read_text())
    took = time.monotonic() - start
    said = first_error(log.read_text(errors="replace"))
    print(f"{job['name']}: failed after {took:.0f} s ({status})\n{said}\n", flush=True)
    return None


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """Ends what an engine may have left behind: its scheduler would keep the GPU's memory."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def first_error(log: str) -> str:
    """The first traceback of a log, and the log's end: what lies between explains little."""
    lines = [line[:300] for line in log.splitlines()]
    starts = [index for index, line in enumerate(lines) if "Traceback (most recent" in line]
    if not starts:
        return "\n".join(["no traceback; the log ends:", *lines[-ERROR_LINES:]])
    first = lines[starts[0] :]
    # It ends with its message: the first line after it that belongs to no frame.
    end = next((i for i, line in enumerate(first[1:], 1) if line[:1] not in (" ", "")), 0)
    shown = first[: end + 4]
    if len(shown) > ERROR_LINES:
        shown = [shown[0], "  ...", *shown[-ERROR_LINES:]]
    return "\n".join([*shown, "the log ends:", *lines[-5:]])


def compare(answers: list[list[int]], expected: list[list[int]], gaps: list[Any]) -> dict[str, int]:
    """Answers that are wrong, and those that took another turn at a tie."""
    found = {"wrong": 0, "ties": 0}
    for answer, right, gap in zip(answers, expected, gaps, strict=True):
        pairs = enumerate(zip(answer, right, strict=False))
        turn = next((index for index, (ours, theirs) in pairs if ours != theirs), None)
        if turn is not None:
            found["ties" if gap[turn] < TIE else "wrong"] += 1
        elif len(answer) != len(right):
            found["wrong"] += 1
    return found


def judge(case: Case, result: Any, expected: dict[str, list[Any]]) -> dict[str, Any]:
    """What a case's result says, in short."""
    if result is None:
        return {"ok": False, "problem": "did not finish"}
    found = [compare(each, expected["tokens"], expected["gaps"]) for each in result["outputs"]]
    loaded, reset = result["loaded"], result["reset"]
    problems = []
    if any(each["wrong"] for each in found):
        problems.append("says something else")
    if loaded["high_water"] > case.capacity:
        problems.append("took more than its capacity")
    if loaded["high_water"] < reset["charge"] + 2 * reset["page"] and case.capacity == ROOMY:
        problems.append("never grew")
    if not result["flushed"]:
        problems.append("its prefix cache could not be flushed")
    if not at_rest(reset):
        problems.append("keeps memory when idle")
    return {"ok": not problems, "problem": "; ".join(problems), "found": found, **result}


def environment_of(out: Path) -> dict[str, str]:
    path = [str(ROOT / "benchmarks/gpu/sglang_startup"), str(ROOT / "tests/support")]
    return {
        "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")]),
        "SGLANG_WITHOUT_KERNELS": "1",
        "SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK": "1",
        "SGLANG_IS_FLASHINFER_AVAILABLE": "false",
        # A leak that it finds ends it.
        "SGLANG_IS_IN_CI": "true",
        "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
        "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
        "SGLANG_CUDA_COREDUMP_BEFORE_CRASH_WAIT_SECS": "0",  # a failed engine ends at once
        "TRITON_F32_DEFAULT": "ieee",
        "TORCHDYNAMO_DISABLE": "1",  # no compiler between what is compared
        "HF_HUB_OFFLINE": "1",
        "TRITON_CACHE_DIR": str(out / "triton"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results and logs")
    parser.add_argument("--cases", help="of " + ",".join(case.name for case in CASES))
    parser.add_argument("--at-a-time", type=int, default=3, help="engines at a time")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds in all")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        job = json.loads(options.job)
        said = transformers_say(job["model"]) if job["name"] == "transformers" else engine(job)
        options.out.write_text(json.dumps(said))
        return 0

    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    chosen = options.cases.split(",") if options.cases else [case.name for case in CASES]
    if unknown := set(chosen) - {case.name for case in CASES}:
        parser.error(f"no cases {', '.join(sorted(unknown))}")
    return compare_all(out, chosen, options.limit, options.at_a_time)


def compare_all(out: Path, chosen: list[str], limit_s: float, at_a_time: int) -> int:
    deadline = time.monotonic() + limit_s
    model = str(out / "model")
    subprocess.run([sys.executable, str(ROOT / "tests/sglang/make_model.py"), model], check=True)
    common, saving = environment_of(out), threading.Lock()

    def left() -> float:
        return deadline - time.monotonic()

    def one(case: Case) -> None:
        result = run({**asdict(case), "model": model}, out, {**common, **ours(case)}, left())
        verdict = judge(case, result, expected)
        shown = {name: verdict.get(name) for name in ("ok", "problem", "found", "loaded", "reset")}
        with saving:
            results[case.name] = verdict
            (out / "sglang_equality.json").write_text(json.dumps(results))
            print(f"{case.name}: {json.dumps(shown)}", flush=True)

    def ours(case: Case) -> dict[str, str]:
        return {
            "ENABLE_KVCACHED": "true",
            "KVCACHED_DIR": str(out / f"ledger-{case.name}"),
            "KVCACHED_CAPACITY": str(case.capacity),
            "KVCACHED_HEADROOM": "0",
            "KVCACHED_VIRTUAL": str(VIRTUAL),
            **case.environment,
        }

    plain = {"name": "plain", "model": model, "arguments": {"max_total_tokens": 32768}}
    with ThreadPoolExecutor(2) as both:
        judging = both.submit(run, {"name": "transformers", "model": model}, out, {}, left())
        found = run(plain, out, common, left())
        expected = judging.result()
    if expected is None or found is None:
        return 1
    rounds = [compare(each, expected["tokens"], expected["gaps"]) for each in found["outputs"]]
    print(f"plain: of {len(PROMPTS)} answers {json.dumps(rounds)}; {found['seconds']:.1f} s")
    right = not any(each["wrong"] for each in rounds)
    results: dict[str, Any] = {"plain": {"ok": right, "found": rounds, **found}}
    with ThreadPoolExecutor(at_a_time) as pool:
        list(pool.map(one, [case for case in CASES if case.name in chosen]))
    return 0 if all(verdict["ok"] for verdict in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
