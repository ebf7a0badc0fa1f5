#!/usr/bin/env python3
"""A serving benchmark for engines whose own cannot read requests from a file (vLLM 0.8.4): sends
them to an OpenAI-compatible server at random moments, and prints what the engines' own print.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median

import httpx
from transformers import AutoTokenizer

SEED = 1


@dataclass(slots=True)
class Answer:
    """Times are seconds; ``tokens`` counts those that were asked for and came."""

    prompt_tokens: int
    tokens: int = 0
    ttft_s: float = 0.0
    latency_s: float = 0.0
    error: str = ""

    @property
    def tpot_s(self) -> float:
        return (self.latency_s - self.ttft_s) / max(1, self.tokens - 1)


async def ask(
    client: httpx.AsyncClient, model: str, prompt: str, answer: Answer, most: int
) -> None:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": most,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    start = time.perf_counter()
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                answer.latency_s = time.perf_counter() - start
                answer.ttft_s = answer.ttft_s or answer.latency_s
    except httpx.HTTPError as error:
        answer.error = f"{type(error).__name__}: {error}"
        return
    answer.tokens = most


async def replay(options: argparse.Namespace) -> tuple[list[Answer], float]:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    draw, answers, tasks = random.Random(SEED), [], []
    async with httpx.AsyncClient(base_url=options.url, timeout=600.0) as client:
        start = time.perf_counter()
        for request in json.loads(options.requests.read_text()):
            prompt, told = (turn["value"] for turn in request["conversations"])
            answers.append(Answer(len(tokenizer.encode(prompt))))
            most = max(1, len(tokenizer.encode(told)))
            call = ask(client, options.model, prompt, answers[-1], most)
            tasks.append(asyncio.create_task(call))
            await asyncio.sleep(draw.expovariate(options.rate))
        await asyncio.gather(*tasks)
        return answers, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--requests", type=Path, required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    answers, seconds = asyncio.run(replay(options))
    good = [answer for answer in answers if not answer.error]
    result = {
        "requests": len(answers),
        "failed": len(answers) - len(good),
        "seconds": seconds,
        "output_tokens_per_s": sum(answer.tokens for answer in good) / seconds,
        "answers": [asdict(answer) for answer in answers],
    }
    options.out.write_text(json.dumps(result, indent=1))
    print(f"Successful requests: {len(good)} of {len(answers)} in {seconds:.2f} s")
    print(f"Output token throughput (tok/s): {result['output_tokens_per_s']:.2f}")
    for name in ("ttft_s", "tpot_s"):
        values = sorted(1e3 * getattr(answer, name) for answer in good)
        if values:
            p99 = values[min(len(values) - 1, int(0.99 * len(values)))]
            label = name.removesuffix("_s").upper()
            print(
                f"{label} (ms): mean {mean(values):.2f}, median {median(values):.2f}, P99 {p99:.2f}"
            )
    if len(good) < len(answers):
        raise SystemExit(f"failed: {next(answer.error for answer in answers if answer.error)}")


if __name__ == "__main__":
    main()
