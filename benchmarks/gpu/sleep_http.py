"""An engine behind `vllm serve` sleeps and wakes, by the calls that `kvcached serve` makes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx

from kvcached import nvml
from kvcached.demo.servers import vllm_command
from kvcached.router.sleeping import VllmSleeper

GIB = 1 << 30
PORT = 8731
URL = f"http://127.0.0.1:{PORT}"
START_LIMIT_S = 180.0
PROMPTS = [[(7 * i + 13 * j) % 100_000 + 10 for j in range(200)] for i in range(8)]


def run(model: str, out: Path, runner: str) -> int:
    """Plays it; prints a table; 1 if something is not as it must be."""
    begun = time.monotonic()
    server = start(model, out, runner)
    try:
        told = asyncio.run(play(server))
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
    told["all_s"] = time.monotonic() - begun
    (out / "sleep-http.json").write_text(json.dumps(told, indent=1))
    for name, value in told.items():
        print(f"{name:28} {value:.2f}" if isinstance(value, float) else f"{name:28} {value}")
    right = told["same after"] and told["same of who waited"] and told["waited while asleep"]
    return 0 if right and told["freed_gib"] > 1 else 1


def start(model: str, out: Path, runner: str) -> subprocess.Popen[bytes]:
    words = [
        *(*vllm_command(), "serve", model, "--port", str(PORT)),
        *("--host", "127.0.0.1", "--load-format", "dummy", "--skip-tokenizer-init"),
        *("--dtype", "bfloat16", "--max-model-len", "4096", "--max-num-seqs", "64"),
        *("--served-model-name", "model", "--generation-config", "vllm", "--enable-sleep-mode"),
        *("--compilation-config", '{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}'),
        *("--attention-config", '{"backend": "FLASH_ATTN"}'),
    ]
    changes = {
        "ENABLE_KVCACHED": "true",
        "KVCACHED_DIR": str(out / "ledger-http"),
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1" if runner == "V2" else "0",
    }
    with (out / "http.log").open("wb") as log:
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **changes},
            start_new_session=True,
        )


async def play(server: subprocess.Popen[bytes]) -> dict[str, Any]:
    gpu = nvml.Gpu(nvml.visible_uuid(0, os.environ.get("CUDA_VISIBLE_DEVICES")))
    told: dict[str, Any] = {}
    async with httpx.AsyncClient(timeout=120.0) as client:
        told["start_s"] = await healthy(client, server)
        first = await ask(client)
        awake = gpu.memory()[0]
        sleeper = VllmSleeper(client, 1)
        for name in ("sleep_s", "sleep again_s"):
            begun = time.monotonic()
            await sleeper.fall_asleep(URL)
            told[name] = time.monotonic() - begun
            told["freed_gib"] = (awake - gpu.memory()[0]) / GIB
            waiting = asyncio.ensure_future(ask(client))
            await asyncio.sleep(1.0)
            told["waited while asleep"] = not waiting.done()
            begun = time.monotonic()
            await sleeper.wake(URL)
            told[name.replace("sleep", "wake")] = time.monotonic() - begun
            told["same of who waited"] = await waiting == first
            told["same after"] = await ask(client) == first
        # Level 2 needs a checkpoint to read anew; here only that the calls go through.
        for path in ("/sleep?level=2", "/wake_up?tags=weights", "/wake_up?tags=kv_cache"):
            (await client.post(URL + path)).raise_for_status()
            told[f"asleep after {path}"] = (await client.get(URL + "/is_sleeping")).text
    return told


async def healthy(client: httpx.AsyncClient, server: subprocess.Popen[bytes]) -> float:
    begun = time.monotonic()
    while time.monotonic() - begun < START_LIMIT_S:
        if server.poll() is not None:
            break
        try:
            if (await client.get(URL + "/health")).is_success:
                return time.monotonic() - begun
        except httpx.TransportError:
            await asyncio.sleep(0.2)
    raise SystemExit("the server did not start: see http.log")


async def ask(client: httpx.AsyncClient) -> list[Any]:
    async def one(prompt: list[int]) -> Any:
        body = {
            "model": "model",
            "prompt": prompt,
            "max_tokens": 32,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        answer = await client.post(URL + "/v1/completions", json=body)
        answer.raise_for_status()
        return answer.json()["choices"][0]["token_ids"]

    return [await one(prompt) for prompt in PROMPTS]
