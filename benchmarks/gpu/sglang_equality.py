#!/usr/bin/env python3
"""Does an SGLang engine with kvcached on a GPU say what a plain one says, and transformers?

Everything is in float32, so that transformers can judge: an engine that lost some of its KV cache
says something else, as the weights are such that attention decides. See README.md for what to set
up; ``sglang_pack.py`` makes what a machine without a package index needs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [[(i * 7 + j * 13) % 990 + 5 for j in range(40 + 8 * i)] for i in range(48)]
MAX_TOKENS = 48
START_LIMIT_S = 240
# Each layer has 4096 slots on a page of each of its tensors: 16 MiB a page.
VIRTUAL = 256 * MIB
ROOMY = 256 * MIB
TIGHT = 64 * MIB


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
    Case("tight-chunked", TIGHT, {"chunked_prefill_size": 128}),
    Case("tight-no-overlap", TIGHT, {"disable_overlap_schedule": True}),
    Case("zero", TIGHT, {}, {"KVCACHED_UNMAPPED": "zero"}),
    Case("together", TIGHT, {}, {"KVCACHED_LAYOUT": "block"}),
    Case("graphs", TIGHT, {"disable_cuda_graph": False}),
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
        built.flush_cache()
        time.sleep(3.0)
        result["reset"] = facts()
    result["free_mib"] = torch.cuda.mem_get_info()[0] // MIB
    built.shutdown()
    return result


def facts() -> dict[str, int]:
    from kvcached import nvml
    from kvcached.config import Config
    from kvcached.ledger import Ledger

    device = nvml.uuid_of(0)
    with Ledger.open(Config.from_env().directory, device, create=False, read_only=True) as ledger:
        snapshot = ledger.snapshot()
        (account,) = snapshot.accounts
    numbers = {name: getattr(account, name) for name in ("charge", "created", "cached", "pinned")}
    numbers |= {name: getattr(account, name) for name in ("hits", "misses", "evictions")}
    return {**numbers, "page": account.page_bytes, "high_water": snapshot.high_water}


def transformers_say(model: str) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(model, torch_dtype=torch.float32).eval().cuda()
    found.generation_config.eos_token_id = None
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt], device="cuda")
        more = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "do_sample": False}
        out = found.generate(ids, max_new_tokens=MAX_TOKENS, **more)
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def run(job: dict[str, Any], out: Path, environment: dict[str, str]) -> Any:
    """One job in a process of its own; None where it failed, with its log's end printed."""
    answer, log = out / f"{job['name']}.json", out / f"{job['name']}.log"
    command = [sys.executable, __file__, "--job", json.dumps(job), "--out", str(answer)]
    with log.open("wb") as file:
        try:
            subprocess.run(
                command,
                env={**os.environ, **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=START_LIMIT_S,
                check=True,
            )
        except subprocess.SubprocessError as error:
            print(f"{job['name']}: {error}\n{log.read_text(errors='replace')[-3000:]}")
            return None
    return json.loads(answer.read_text())


def judge(case: Case, result: Any, expected: list[list[int]]) -> dict[str, Any]:
    """What a case's result says, in short."""
    if result is None:
        return {"ok": False}
    wrong = [sum(a != b for a, b in zip(o, expected, strict=True)) for o in result["outputs"]]
    loaded, reset = result["loaded"], result["reset"]
    kept = loaded["high_water"] <= case.capacity
    idle = reset["charge"] <= reset["pinned"] + reset["page"]
    return {"ok": wrong == [0, 0] and kept and idle, "wrong": wrong, **result}


def environment_of(out: Path) -> dict[str, str]:
    path = [str(ROOT / "benchmarks/gpu/sglang_startup"), str(ROOT / "tests/support")]
    return {
        "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")]),
        "SGLANG_WITHOUT_KERNELS": "1",
        "SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK": "1",
        "SGLANG_IS_FLASHINFER_AVAILABLE": "false",
        "SGLANG_IS_IN_CI": "true",  # a leak that it finds ends it
        "TRITON_F32_DEFAULT": "ieee",
        "HF_HUB_OFFLINE": "1",
        "TRITON_CACHE_DIR": str(out / "triton"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results and logs")
    parser.add_argument("--cases", help="of " + ",".join(case.name for case in CASES))
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        job = json.loads(options.job)
        said = transformers_say(job["model"]) if job["name"] == "transformers" else engine(job)
        options.out.write_text(json.dumps(said))
        return 0

    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    names = options.cases.split(",") if options.cases else [case.name for case in CASES]
    model = str(out / "model")
    subprocess.run([sys.executable, str(ROOT / "tests/sglang/make_model.py"), model], check=True)
    common = environment_of(out)
    expected = run({"name": "transformers", "model": model}, out, {})
    plain = {"name": "plain", "model": model, "arguments": {"max_total_tokens": 32768}}
    found = run(plain, out, common)
    if expected is None or found is None:
        return 1
    rounds = [sum(a != b for a, b in zip(o, expected, strict=True)) for o in found["outputs"]]
    print(f"plain: {rounds} answers of {len(PROMPTS)} differ from transformers")
    results: dict[str, Any] = {"plain": {"wrong": rounds, "seconds": found["seconds"]}}
    for case in CASES:
        if case.name not in names:
            continue
        changes = {
            "ENABLE_KVCACHED": "true",
            "KVCACHED_DIR": str(out / f"ledger-{case.name}"),
            "KVCACHED_CAPACITY": str(case.capacity),
            "KVCACHED_HEADROOM": "0",
            "KVCACHED_VIRTUAL": str(VIRTUAL),
            **case.environment,
        }
        result = run({**asdict(case), "model": model}, out, {**common, **changes})
        results[case.name] = verdict = judge(case, result, found["outputs"][0])
        shown = {key: verdict.get(key) for key in ("ok", "wrong", "loaded", "reset")}
        print(f"{case.name}: {json.dumps(shown)}", flush=True)
    (out / "sglang_equality.json").write_text(json.dumps(results))
    return 0 if all(results[name]["ok"] for name in results if name != "plain") else 1


if __name__ == "__main__":
    sys.exit(main())
