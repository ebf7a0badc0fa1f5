"""``kvcached bench router``: what the router adds to a request, and whether its memory stays flat.

Three processes: an engine that only streams, the router, and the clients, here. The same requests,
at the same moments of a Poisson process, are sent directly and through the router, turn by turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import uvloop

from kvcached.bench.router_process import MODEL
from kvcached.errors import KvcachedError
from kvcached.ports import free_port
from kvcached.processes import cpu_s, resident_bytes

START_LIMIT_S = 30.0
WARM_UP_S = 2.0
SAMPLES = 20
"""Looks at the router's memory while many requests pass."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The requests."""

    rate: float
    """A second."""
    words: int
    """Parts of each answer."""
    gap_s: float
    """The time between them."""


@dataclass(frozen=True, slots=True)
class Round:
    """One turn's requests, in seconds."""

    firsts: Sequence[float]
    lasts: Sequence[float]


def run(
    shape: Shape,
    pairs: int,
    seconds: float,
    requests: int,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Measures ``pairs`` turns of ``seconds`` each, and memory over ``requests`` more."""
    with _processes() as (direct, through, pid):
        return uvloop.run(_run(shape, pairs, seconds, requests, progress, (direct, through), pid))


async def _run(
    shape: Shape,
    pairs: int,
    seconds: float,
    requests: int,
    progress: Callable[[str], None],
    urls: tuple[str, str],
    pid: int,
) -> dict[str, Any]:
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
    async with aiohttp.ClientSession(connector=connector) as session:
        for url in urls:
            await _open_loop(session, url, shape, WARM_UP_S, 0)
        found: list[dict[str, Any]] = []
        for number in range(pairs):
            order = urls if number % 2 == 0 else urls[::-1]
            rounds = {}
            used_s = 0.0
            for url in order:
                before_s = cpu_s(pid)
                rounds[url] = await _open_loop(session, url, shape, seconds, number + 1)
                if url == urls[1]:
                    used_s = cpu_s(pid) - before_s
            found.append(_pair(rounds[urls[0]], rounds[urls[1]], used_s))
            progress(f"pair {number + 1}: {found[-1]}")
        memory = await _memory(session, urls[1], shape, requests, pid, progress)
    keys = ("added_ttft_p50_ms", "added_ttft_p99_ms", "added_p50_ms", "added_p99_ms", "cpu_us")
    medians = {key: round(statistics.median(pair[key] for pair in found), 3) for key in keys}
    setting = {"rate": shape.rate, "words": shape.words, "gap_s": shape.gap_s, "seconds": seconds}
    return {**setting, "cpus": os.cpu_count(), **medians, "pairs": found, "memory": memory}


def _pair(direct: Round, through: Round, used_s: float) -> dict[str, Any]:
    figures: dict[str, Any] = {"requests": len(through.firsts)}
    for name, own, other in (
        ("ttft_", direct.firsts, through.firsts),
        ("", direct.lasts, through.lasts),
    ):
        for percent in (50, 99):
            ours_ms, theirs_ms = (1e3 * _quantile(values, percent) for values in (own, other))
            figures[f"direct_{name}p{percent}_ms"] = round(ours_ms, 3)
            figures[f"router_{name}p{percent}_ms"] = round(theirs_ms, 3)
            figures[f"added_{name}p{percent}_ms"] = round(theirs_ms - ours_ms, 3)
    figures["cpu_us"] = round(1e6 * used_s / max(1, len(through.firsts)), 1)
    return figures


def _quantile(values: Sequence[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


async def _open_loop(
    session: aiohttp.ClientSession, url: str, shape: Shape, seconds: float, seed: int
) -> Round:
    """Requests at the moments of a Poisson process, whether earlier ones are answered or not."""
    dice = random.Random(seed)
    loop = asyncio.get_running_loop()
    at_s = loop.time()
    end_s = at_s + seconds
    tasks = []
    while at_s < end_s:
        await asyncio.sleep(at_s - loop.time())
        tasks.append(loop.create_task(_ask(session, url, shape)))
        at_s += dice.expovariate(shape.rate)
    done = await asyncio.gather(*tasks)
    return Round([first for first, _ in done], [last for _, last in done])


async def _ask(session: aiohttp.ClientSession, url: str, shape: Shape) -> tuple[float, float]:
    """Seconds to the first and the last byte of one answer."""
    body = {"model": MODEL, "stream": True, "prompt": "Say a word.", "max_tokens": shape.words}
    body |= {"words": shape.words, "gap_s": shape.gap_s}
    start_s = time.perf_counter()
    first_s, last = 0.0, b""
    async with session.post(url + "/v1/completions", json=body) as answer:
        async for part in answer.content.iter_any():
            first_s = first_s or time.perf_counter() - start_s
            last = part
    if answer.status != 200 or not last.endswith(b"data: [DONE]\n\n"):
        raise KvcachedError(f"{url}: status {answer.status}, which ends with {last!r}")
    return first_s, time.perf_counter() - start_s


async def _memory(
    session: aiohttp.ClientSession,
    url: str,
    shape: Shape,
    requests: int,
    pid: int,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """The router's memory and descriptors while many requests pass, 32 at a time."""
    if requests == 0:
        return {}
    quick = Shape(shape.rate, shape.words, 0.0)
    rss, start_s = [], time.monotonic()
    for number in range(SAMPLES):
        share = requests * (number + 1) // SAMPLES - requests * number // SAMPLES
        left = iter(range(share))

        async def one_after_the_other(left: Iterator[int] = left) -> None:
            for _ in left:
                await _ask(session, url, quick)

        await asyncio.gather(*(one_after_the_other() for _ in range(32)))
        rss.append(resident_bytes(pid))
        progress(f"{requests * (number + 1) // SAMPLES} requests: {rss[-1] / 2**20:.1f} MiB")
    seconds = time.monotonic() - start_s
    settled = rss[SAMPLES // 5 :]
    return {
        "requests": requests,
        "requests_per_s": round(requests / seconds, 1),
        "rss_bytes": rss,
        "growth_after_a_fifth_bytes": settled[-1] - settled[0],
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
    }


@contextlib.contextmanager
def _processes() -> Iterator[tuple[str, str, int]]:
    """The addresses of the engine and of the router, and the router's process."""
    engine_port, router_port = free_port(), free_port()
    engine, router = (f"http://127.0.0.1:{port}" for port in (engine_port, router_port))
    commands = [
        ["kvcached.bench.router_engine", str(engine_port)],
        ["kvcached.bench.router_process", str(router_port), engine],
    ]
    children = [
        subprocess.Popen([sys.executable, "-m", *command], stdin=subprocess.DEVNULL)
        for command in commands
    ]
    try:
        for child, port in zip(children, (engine_port, router_port), strict=True):
            _wait_for(child, port)
        yield engine, router, children[1].pid
    finally:
        for child in children:
            child.terminate()
        for child in children:
            child.wait()


def _wait_for(child: subprocess.Popen[bytes], port: int) -> None:
    deadline_s = time.monotonic() + START_LIMIT_S
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return
        if child.poll() is not None or time.monotonic() > deadline_s:
            raise KvcachedError(f"a process of the benchmark does not answer: {child.args!r}")
        time.sleep(0.05)
