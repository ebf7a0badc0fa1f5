"""Two servers under one budget: what one does not use goes to the other, and comes back."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness import PROMPTS, Answer, Load, Pair, Server, wait_until

# Of the budget: the rest is less than one of the requests below needs.
FULL = 0.8


def burst(server: Server, count: int, max_tokens: int = 24) -> list[Answer]:
    """So many requests at once, all of different prompts."""
    with ThreadPoolExecutor(count) as pool:
        prompts = [[number + 5, *PROMPTS[number % 16]] for number in range(count)]
        return list(pool.map(lambda prompt: server.ask(prompt, max_tokens), prompts))


def fill_with_cache(pair: Pair, server: Server) -> None:
    """Every free page of the budget ends up as cached prefixes of an idle ``server``."""
    other = pair.b if server is pair.a else pair.a
    assert other.engine is not None
    other.engine.reset_prefix_cache()
    for number in range(40):
        if pair.account(server).cached > FULL * pair.capacity:
            break
        prompt = [number * 3 + 9, *PROMPTS[-1]]
        assert server.ask(prompt, 8).ok
    assert pair.account(server).cached > FULL * pair.capacity


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_an_idle_cache_goes_to_the_engine_that_works(pair: Pair) -> None:
    fill_with_cache(pair, pair.a)
    before = pair.account(pair.a)
    # What B could have without A's giving any back.
    there = pair.capacity - before.charge
    with pair.watch() as memory:
        start = time.monotonic()
        first: list[float] = []

        def see_the_lease() -> None:
            while pair.account(pair.b).leased <= there and time.monotonic() - start < 60:
                time.sleep(0.001)
            first.append(time.monotonic() - start)

        thread = threading.Thread(target=see_the_lease)
        thread.start()
        answers = burst(pair.b, 10)
        thread.join()
    after = pair.account(pair.a)
    print(f"more than was free {first[0] * 1e3:.0f} ms after the burst's start")
    assert first[0] < 60
    assert [a.error for a in answers if not a.ok] == []
    assert after.charge < before.charge and after.reclaimed > before.reclaimed
    assert memory.peak <= pair.capacity
    assert pair.ledger.snapshot().high_water <= pair.capacity


def test_a_burst_leaves_a_busy_neighbour_its_share(pair: Pair) -> None:
    """B wants far more than its half while A works and holds more than half in its cache."""
    fill_with_cache(pair, pair.a)
    share = pair.capacity // 2
    refused = pair.account(pair.b).refused
    charges: list[tuple[bool, int, int]] = []
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.01):
            a, b = pair.account(pair.a), pair.account(pair.b)
            # Beside block 0: requests use blocks.
            charges.append((a.in_use > a.block_bytes, a.charge, b.charge))

    with Load(pair.a, 6) as load, ThreadPoolExecutor(2) as threads:
        wait_until(lambda: len(load.answers) > 3, 60, "a works")
        before = pair.account(pair.a)
        # The clients and the front ends have the same two cores as the engines: there are moments
        # when none of the load has reached A. While this one runs, which its engine tells, A works.
        long = Answer()
        asked = threads.submit(pair.a.ask, PROMPTS[0], 1400, answer=long)
        wait_until(lambda: long.tokens, 30, "the long request runs")
        looking = threads.submit(look)
        answers = burst(pair.b, 24)
        over.set()
        looking.result()
        answers.append(asked.result())
    assert [a.error for a in answers if not a.ok] + load.failures() == []
    assert pair.account(pair.b).refused > refused, "b was not short of memory"
    least = min(a for _, a, _ in charges)
    at_work = list(itertools.takewhile(lambda each: each[0], charges))
    least_busy = min(a for _, a, _ in at_work)
    most = max(b for _, _, b in charges)
    print(
        f"a from {before.charge} to {least} ({least_busy} in {len(at_work)} looks), b to {most}, "
        f"of {pair.capacity}"
    )
    assert before.charge > share and before.charge > least
    # A does not keep what it does not want itself: the last, partly filled blocks of requests.
    assert least_busy > share * 3 // 4
    assert max(b for _, _, b in at_work) > charges[0][2], "b got nothing while a worked"
    # What A has in use comes as its requests end, which may be later than B's burst.
    assert most > share // 2


def test_an_engine_starts_while_the_other_has_cached_everything(pair: Pair) -> None:
    fill_with_cache(pair, pair.a)
    pair.b.kill()
    wait_until(lambda: pair.ledger.reap() or not_there(pair, pair.b), 5, "b's account is gone")
    for number in range(3):  # the page that b had, too
        assert pair.a.ask([number * 7 + 800, *PROMPTS[-1]], 8).ok
    with pair.watch() as memory:
        pair.b.start()
        pair.b.wait()
        assert pair.b.ask(PROMPTS[4], 16).ok
    assert memory.peak <= pair.capacity
    assert pair.ledger.snapshot().high_water <= pair.capacity


def not_there(pair: Pair, server: Server) -> bool:
    return pair.ledger.snapshot().account(server.name) is None


def test_an_engine_that_can_only_wait_sleeps(pair: Pair, plain: list[list[int]]) -> None:
    """A holds everything and is stopped, so that nothing comes back; then it continues."""
    fill_with_cache(pair, pair.a)
    core, worker = (pair.account(s) for s in (pair.a, pair.b))
    assert core.owner_pid is not None and worker.owner_pid is not None
    os.kill(core.owner_pid, signal.SIGSTOP)
    try:
        answers: list[Answer] = []
        wanted = [(i * 11) % 990 + 5 for i in range(1500)]
        thread = threading.Thread(target=lambda: answers.append(pair.b.ask(wanted, 8)))
        thread.start()
        wait_until(lambda: pair.account(pair.b).demand > 0, 20, "b waits for memory")
        used, start = cpu_s(worker.owner_pid), time.monotonic()
        refused = pair.account(pair.b).refused
        time.sleep(2.0)
        elapsed = time.monotonic() - start
        tries = (pair.account(pair.b).refused - refused) / elapsed
        load = (cpu_s(worker.owner_pid) - used) / elapsed
        print(f"waiting: {tries:.0f} attempts/s, {load:.0%} of a core")
        assert answers == []
        # A waiting engine asks for the lease once or twice in each of its steps.
        assert 0 < tries < 100
        assert load < 0.5
    finally:
        os.kill(core.owner_pid, signal.SIGCONT)
    thread.join()
    assert answers[0].ok, answers[0].error
    assert pair.a.ask(PROMPTS[5], 24).tokens == plain[5][:24]
