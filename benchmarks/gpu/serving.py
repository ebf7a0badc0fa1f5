#!/usr/bin/env python3
"""Two models that take turns behind `kvcached serve`: what a turn costs with each kind of sleep.

One place is awake (``max_awake: 1``): a request for the other model puts the first one to sleep
and wakes the second. Both have checkpoints of their own on disk. For each kind a service of its
own: ``engine-1`` (weights wait in the host's memory), ``engine-2`` (they are read from disk again)
and ``stop`` (the process ends and starts). Every answer must be that model's first one.

    python3 benchmarks/gpu/serving.py --out build/serving --how engine-1,engine-2,stop
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import fleet
import httpx
import yaml

from kvcached import nvml
from kvcached.bench.serve import service

HOW = ("engine-1", "engine-2", "stop")
NAMES = ("a", "b")
PROMPTS = [[(7 * i + 13 * j) % 4000 + 10 for j in range(200)] for i in range(8)]
TOKENS = 32
ANSWER_LIMIT_S = 300.0


def make_checkpoint(folder: Path, shape: str, seed: int) -> str:
    """A model with weights on disk, from a seed. Made where torch finds a GPU, else on the CPU."""
    import torch
    from safetensors.torch import save_file

    path = Path(fleet.make_model(folder, shape))
    config = json.loads((path / "config.json").read_text())
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim", hidden // config["num_attention_heads"])
    queries, keys = (head * config[f"num_{n}_heads"] for n in ("attention", "key_value"))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden)
    }
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": size
            for name, size in {
                "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
                "self_attn.q_proj": (queries, hidden),
                "self_attn.k_proj": (keys, hidden),
                "self_attn.v_proj": (keys, hidden),
                "self_attn.o_proj": (hidden, queries),
                "mlp.gate_proj": (wide, hidden),
                "mlp.up_proj": (wide, hidden),
                "mlp.down_proj": (hidden, wide),
            }.items()
        }
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chance = torch.Generator(device).manual_seed(seed)
    weights = {}
    for name, size in shapes.items():
        made = torch.empty(size, dtype=torch.bfloat16, device=device)
        made = made.fill_(1.0) if len(size) == 1 else made.normal_(0, 0.05, generator=chance)
        weights[name] = made.cpu()
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return str(path)


def python_with_vllm(out: Path) -> str:
    """A Python that has a `vllm` command beside it, as an environment has."""
    if Path(sys.executable).with_name("vllm").exists():
        return sys.executable
    folder = out / "bin"
    folder.mkdir(exist_ok=True)
    for name, words in {"python": "", "vllm": "-m vllm.entrypoints.cli.main"}.items():
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        path.chmod(0o755)
    return str(folder / "python")


def settings_file(out: Path, how: str, models: dict[str, str], device: str | None) -> Path:
    arguments: dict[str, Any] = {
        "skip-tokenizer-init": True,
        "dtype": "bfloat16",
        "max-model-len": 4096,
        "max-num-seqs": 64,
        "generation-config": "vllm",
        "enable-prefix-caching": False,  # every answer is computed
    }
    memory: dict[str, Any] = {"directory": str(out / f"ledger-{how}")}
    if device is None:
        arguments |= {
            "compilation-config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
            "attention-config": {"backend": "FLASH_ATTN"},
        }
    else:
        arguments |= {"enforce-eager": True, "block-size": 32}
        memory |= {"device": device, "capacity": "256MiB"}
    settings = {
        "listen": "127.0.0.1:0",
        "memory": memory,
        "max_awake": 1,
        "turn_s": 1,
        "models": [
            {
                "name": name,
                "model": models[name],
                "python": python_with_vllm(out),
                "arguments": arguments,
                "sleep": {"how": how},
            }
            for name in NAMES
        ],
    }
    path = out / f"{how}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def ask(client: httpx.Client, name: str, prompt: list[int], tokens: int) -> tuple[float, list[int]]:
    """Seconds, and the token ids."""
    begun = time.monotonic()
    answer = client.post(
        "/v1/completions",
        json={
            "model": name,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        },
    )
    if answer.is_error:
        raise SystemExit(f"{name}: {answer.status_code} {answer.text[:500]}")
    return time.monotonic() - begun, answer.json()["choices"][0]["token_ids"]


def used_gib(device: str | None) -> float:
    """What is in use on the GPU, by anybody."""
    if device is not None:
        return 0.0
    return nvml.Gpu(nvml.visible_uuid(0, os.environ.get("CUDA_VISIBLE_DEVICES"))).memory()[0] / (
        1 << 30
    )


def play(url: str, switches: int, device: str | None) -> dict[str, Any]:
    """Both are started, then asked in turn. Seconds until the first token of the first request."""
    told: dict[str, Any] = {"start_s": [], "turn_s": [], "awake_s": [], "used_gib": []}
    right: dict[str, list[list[int]]] = {}
    wrong = 0
    with httpx.Client(base_url=url, timeout=ANSWER_LIMIT_S) as client:
        for turn in range(len(NAMES) + switches):
            name = NAMES[turn % len(NAMES)]
            seconds, _ = ask(client, name, PROMPTS[0], 1)
            told["start_s" if turn < len(NAMES) else "turn_s"].append(round(seconds, 3))
            told["awake_s"].append(round(ask(client, name, PROMPTS[0], 1)[0], 3))
            told["used_gib"].append(round(used_gib(device), 1))
            answers = [ask(client, name, prompt, TOKENS)[1] for prompt in PROMPTS]
            wrong += answers != right.setdefault(name, answers)
            fleet.say(f"{name}: first token after {seconds:.2f} s")
        told["starts"] = [each["starts"] for each in client.get("/status").json()["models"]]
    told["wrong"] = wrong
    told["models_differ"] = right[NAMES[0]] != right[NAMES[1]]
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results and logs")
    parser.add_argument("--how", default=",".join(HOW), help="kinds of sleep")
    parser.add_argument("--shape", choices=sorted(fleet.SHAPES), default="8b")
    parser.add_argument("--switches", type=int, default=4, help="turns after both have started")
    parser.add_argument("--device", help="host:NAME, for a machine without a GPU (`stop` only)")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    folders = [out / f"models-{name}" for name in NAMES]
    # In processes of their own, which leave nothing on the GPU.
    with ProcessPoolExecutor(len(NAMES), get_context("spawn")) as makers:
        paths = makers.map(
            make_checkpoint, folders, [options.shape] * len(NAMES), range(len(NAMES))
        )
        models = dict(zip(NAMES, paths, strict=True))
    fleet.say("checkpoints made")
    results = {}
    for how in options.how.split(","):
        path = settings_file(out, how, models, options.device)
        with service(path, out / f"{how}.log") as url:
            results[how] = play(url, options.switches, options.device)
        (out / "serving.json").write_text(json.dumps(results, indent=1))
    print(f"{'sleep':10} {'start':>8} {'turn':>8} {'awake':>8} {'in use':>9}  starts, wrong turns")
    for how, told in results.items():
        start, turn, awake = (median(told[f"{n}_s"]) for n in ("start", "turn", "awake"))
        print(
            f"{how:10} {start:6.2f} s {turn:6.2f} s {awake:6.3f} s {max(told['used_gib']):5.1f} GiB"
            f"  {told['starts']}, {told['wrong']}"
        )
    good = all(told["wrong"] == 0 and told["models_differ"] for told in results.values())
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
