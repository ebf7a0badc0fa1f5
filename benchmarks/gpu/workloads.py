"""The work that engines are given. The same requests in the same order for every engine."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from turns import Turns

Damage = Callable[[Any], None]
LOW_TOKEN, HIGH_TOKEN = 10, 120_000
DAMAGE_AT_STEP = 12
# Requests at once; tokens of a prompt and of an answer.
BURSTS: Mapping[str, tuple[int, int, int]] = {
    "throughput": (200, 1024, 512),
    "short": (400, 128, 128),
    "sustained": (1600, 128, 128),  # as short, for four times as long
    "long": (64, 3500, 256),
}


def keep_within(vocabulary: int) -> None:
    """From now on, prompts have only tokens that such a model knows."""
    global HIGH_TOKEN
    HIGH_TOKEN = min(HIGH_TOKEN, vocabulary - 1)


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: a prompt in tokens, when its answer ends, and when it arrives."""

    prompt: list[int]
    max_tokens: int
    stop_tokens: list[int] = field(default_factory=list)
    at_s: float = 0.0


def play(
    llm: Any,
    asks: Sequence[Ask],
    *,
    damage: Damage | None = None,
    abort_every: int = 0,
    start_s: float | None = None,
    give_up_s: float = float("inf"),
    turns: Turns | None = None,
) -> dict[str, Any]:
    """Sends each request when it is due (``asks`` in order of arrival) and steps the engine until
    the last has answered; returns the answers' tokens in order (None for those that were aborted),
    and times. ``step_ends`` are on the system's monotonic clock; ``start_s`` is on it too, now
    where it is None. ``each`` has, for every answer: seconds from when its request was due until
    it was sent (a step was under way), from then to its first token, and between tokens.

    ``damage`` is done to the worker at one step on the way. ``abort_every`` steps, a request is
    aborted. ``give_up_s`` seconds after the start, all that have not answered are. With ``turns``
    the engine works only when it is its turn.
    """
    engine = llm.llm_engine
    tokens: dict[str, list[int] | None] = {str(index): None for index in range(len(asks))}
    times: dict[str, tuple[float, float]] = {}
    late_s: list[float] = []
    victims = list(tokens)
    random.Random(3).shuffle(victims)
    step_ends: list[float] = []
    sent = 0
    start = time.monotonic() if start_s is None else start_s
    while sent < len(asks) or engine.has_unfinished_requests():
        over = time.monotonic() - start > give_up_s
        if turns is not None and not over:
            due_s = start + asks[sent].at_s if sent < len(asks) else None
            if not turns.may_go_on(due_s, engine.has_unfinished_requests()):
                continue
        closed = turns is not None and (over or turns.hurries())
        while sent < len(asks) and asks[sent].at_s <= time.monotonic() - start and not closed:
            late_s.append(time.monotonic() - start - asks[sent].at_s)
            _send(engine, str(sent), asks[sent])
            sent += 1
        if time.monotonic() - start > give_up_s:
            engine.abort_request([name for name in tokens if int(name) < sent and not tokens[name]])
            break
        if not engine.has_unfinished_requests():
            left_s = max(0.0, asks[sent].at_s - (time.monotonic() - start))
            time.sleep(left_s if turns is None else min(left_s, 0.005))
            continue
        for output in engine.step():
            if output.finished and output.outputs:
                tokens[output.request_id] = list(output.outputs[0].token_ids)
                times[output.request_id] = _times(output.metrics)
        step_ends.append(time.monotonic())
        if damage is not None and len(step_ends) == DAMAGE_AT_STEP:
            llm.collective_rpc(damage)
        if abort_every and len(step_ends) % abort_every == 0 and victims:
            engine.abort_request([victims.pop()])
    seconds = time.monotonic() - start
    given = list(tokens.values())
    return {
        "tokens": given,
        "seconds": seconds,
        "steps": len(step_ends),
        "step_ends": step_ends,
        "output_tokens": sum(len(answer) for answer in given if answer is not None),
        "each": [[late_s[int(name)], *times[name]] if name in times else None for name in tokens],
        **_percentiles(list(times.values())),
    }


def _send(engine: Any, name: str, ask: Ask) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0,
        max_tokens=ask.max_tokens,
        stop_token_ids=ask.stop_tokens or None,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    engine.add_request(name, {"prompt_token_ids": ask.prompt}, params)


def _times(metrics: Any) -> tuple[float, float]:
    """Time to the first token, and between tokens."""
    if metrics is None or not metrics.num_generation_tokens:
        return (0.0, 0.0)
    between = (metrics.last_token_ts - metrics.first_token_ts) / max(
        1, metrics.num_generation_tokens - 1
    )
    return (metrics.first_token_latency, between)


def _percentiles(times: Sequence[tuple[float, float]]) -> dict[str, float]:
    if not times:
        return {}
    first, between = (sorted(values) for values in zip(*times, strict=True))

    def at(values: Sequence[float], part: float) -> float:
        return values[min(len(values) - 1, int(len(values) * part))]

    return {
        "ttft_p50_s": at(first, 0.5),
        "ttft_p99_s": at(first, 0.99),
        "tpot_p50_s": at(between, 0.5),
        "tpot_p99_s": at(between, 0.99),
    }


def _prompt(random_: random.Random, tokens: int) -> list[int]:
    return [random_.randrange(LOW_TOKEN, HIGH_TOKEN) for _ in range(tokens)]


def churn_asks() -> list[Ask]:
    draw = random.Random("churn")
    return [
        Ask(_prompt(draw, draw.randrange(20, 1500)), draw.randrange(4, 120)) for _ in range(160)
    ]


def stop_asks() -> list[Ask]:
    draw = random.Random("stop")
    ends = list(range(5, 128_000, 40))
    return [Ask(_prompt(draw, draw.randrange(20, 1200)), 200, ends) for _ in range(120)]


def churn(llm: Any, damage: Damage | None) -> dict[str, Any]:
    """Prompts and answers of all lengths: blocks come and go all the time."""
    return play(llm, churn_asks(), damage=damage)


def stop(llm: Any, damage: Damage | None) -> dict[str, Any]:
    """Answers that end where nobody knew: with asynchronous scheduling the step after the last is
    under way by then.
    """
    return play(llm, stop_asks(), damage=damage)


def abort(llm: Any, damage: Damage | None) -> dict[str, Any]:
    """Requests that are aborted while they run."""
    draw = random.Random("abort")
    asks = [Ask(_prompt(draw, draw.randrange(20, 1200)), 150) for _ in range(60)]
    return play(llm, asks, damage=damage, abort_every=6)


def prefix(llm: Any, damage: Damage | None) -> dict[str, Any]:
    """Three waves over a few common beginnings; the later ones find them cached, or evicted."""
    draw = random.Random("prefix")
    beginnings = [_prompt(draw, 640) for _ in range(6)]
    waves: list[dict[str, Any]] = []
    for _ in range(3):
        asks = []
        for _ in range(70):
            head = beginnings[draw.randrange(6)][: draw.choice((640, 640, 333))]
            own = _prompt(draw, draw.randrange(5, 300))
            asks.append(Ask(head + own if draw.random() < 0.8 else own, draw.randrange(4, 90)))
        waves.append(play(llm, asks, damage=damage))
    return {
        "tokens": [answer for wave in waves for answer in wave["tokens"]],
        "seconds": sum(wave["seconds"] for wave in waves),
        "steps": sum(wave["steps"] for wave in waves),
    }


def _at_once(
    llm: Any, damage: Damage | None, seed: str, burst: tuple[int, int, int]
) -> dict[str, Any]:
    """One of ``BURSTS``, its tokens drawn by ``seed``; a few requests before that do not count."""
    requests, prompt, answer = burst
    draw = random.Random(seed)
    play(llm, [Ask(_prompt(draw, 64), 8) for _ in range(4)])
    asks = [Ask(_prompt(draw, prompt), answer) for _ in range(requests)]
    return _without_tokens(play(llm, asks, damage=damage))


def _without_tokens(result: dict[str, Any]) -> dict[str, Any]:
    result["output_tokens_per_s"] = result["output_tokens"] / result["seconds"]
    del result["tokens"]
    return result


def paced(llm: Any, damage: Damage | None) -> dict[str, Any]:
    """300 requests of 512 tokens in and 128 out, 15 a second on average: far from what the GPU
    can do.
    """
    return _paced(llm, damage, "paced", 300)


def is_numbered(name: str) -> bool:
    """Whether it is work that comes over and over, ``WORK-NUMBER`` (``numbered``)."""
    work, _, number = name.rpartition("-")
    return number.isdigit() and (work == "paced" or work in BURSTS)


def numbered(llm: Any, name: str) -> dict[str, Any]:
    """``paced-NUMBER`` or a burst's name with a number: each has requests of its own. Number 0 is
    a fifth of them, to warm up.
    """
    work, _, number = name.rpartition("-")
    part = 1 if int(number) else 5
    if work == "paced":
        return _paced(llm, None, name, 300 // part)
    requests, prompt, answer = BURSTS[work]
    return _at_once(llm, None, name, (requests // part, prompt, answer))


def _paced(llm: Any, damage: Damage | None, seed: str, requests: int) -> dict[str, Any]:
    draw = random.Random(seed)
    asks, at_s = [], 0.0
    for _ in range(requests):
        asks.append(Ask(_prompt(draw, 512), 128, at_s=at_s))
        at_s += draw.expovariate(15)
    return _without_tokens(play(llm, asks, damage=damage))


def fill(llm: Any, damage: Damage | None) -> dict[str, Any]:
    """More prompts than there is memory for: what is free ends up as prefix cache."""
    return _no_tokens(llm, f"fill-{time.monotonic()}", 320, 1500, 4)


def decode(llm: Any, damage: Damage | None) -> dict[str, Any]:
    """48 requests that run side by side for a while."""
    return _no_tokens(llm, "decode", 48, 128, 1500)


def burst(llm: Any, damage: Damage | None) -> dict[str, Any]:
    """Prompts for 20 GiB of an 8B model's KV cache, all at once."""
    return _no_tokens(llm, f"burst-{time.monotonic()}", 128, 1280, 32)


def _no_tokens(llm: Any, seed: str, count: int, prompt: int, answer: int) -> dict[str, Any]:
    draw = random.Random(seed)
    return _without_tokens(play(llm, [Ask(_prompt(draw, prompt), answer) for _ in range(count)]))


def nothing(llm: Any, damage: Damage | None) -> dict[str, Any]:
    """No work: for engines that are only there."""
    return {"tokens": [], "seconds": 0.0, "steps": 0}


ASKS: Mapping[str, Callable[[], list[Ask]]] = {"churn": churn_asks, "stop": stop_asks}


def verdict(llm: Any, path: Path) -> dict[str, Any]:
    """What this engine says of another's answers, read from its results: for each token, how far
    its log probability is below that of the likeliest one (0 where it is that one).

    For engines whose batches differ. In bfloat16 a batch of another shape rounds differently, an
    answer that takes another turn stays different, and counting equal tokens says nothing; but
    every token must still be among the likeliest, given those before it.
    """
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    work = json.loads(path.read_text())["work"]
    gaps: list[float] = []
    for name in work.keys() & ASKS.keys():
        for ask, answer in zip(ASKS[name](), work[name]["tokens"], strict=True):
            if answer is None:
                continue
            (output,) = llm.generate(
                [{"prompt_token_ids": ask.prompt + answer}], params, use_tqdm=False
            )
            told = output.prompt_logprobs[len(ask.prompt) :]
            for token, choices in zip(answer, told, strict=True):
                best = max(choice.logprob for choice in choices.values())
                gaps.append(best - choices[token].logprob)
    gaps.sort()
    return {
        "tokens": len(gaps),
        "likeliest": sum(gap == 0 for gap in gaps) / max(1, len(gaps)),
        "gap_p99": gaps[int(0.99 * len(gaps))] if gaps else None,
        "gap_worst": gaps[-1] if gaps else None,
    }


def forget(llm: Any, damage: Damage | None) -> dict[str, Any]:
    """Drops the prefix cache."""
    llm.reset_prefix_cache()
    return nothing(llm, damage)


WORK: Mapping[str, Callable[[Any, Damage | None], dict[str, Any]]] = {
    "churn": churn,
    "stop": stop,
    "abort": abort,
    "prefix": prefix,
    **{name: partial(_at_once, seed=name, burst=burst) for name, burst in BURSTS.items()},
    # Other prompts: by then an engine has met such a burst.
    "short-again": partial(_at_once, seed="short-again", burst=BURSTS["short"]),
    "paced": paced,
    "fill": fill,
    "refill": fill,
    "decode": decode,
    "burst": burst,
    "another-burst": burst,
    "nothing": nothing,
    "forget": forget,
}
