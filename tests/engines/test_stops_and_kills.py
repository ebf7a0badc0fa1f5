"""One of each: the death of any process ends its instance, and its neighbour does not notice."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from statistics import median

import chaos
import pytest
from harness import MAX_TOKENS, MIB, PROMPTS, LlmProcess, Pair, p99, switched_on, wait_until

from kvcached.ledger import Ledger


@pytest.mark.parametrize("what", ["core", "worker"])
def test_a_stopped_process_goes_on_correctly(pair: Pair, plain: list[list[int]], what: str) -> None:
    ttft_s = chaos.stop(pair, what, after_s=0.7, for_s=1.0, expected=plain)
    print(f"stop {what}: B's TTFT p99 {p99(ttft_s) * 1e3:.0f} ms")


@pytest.mark.parametrize("what", chaos.KINDS)
def test_the_death_of_one_process_ends_the_instance(
    pair: Pair, plain: list[list[int]], what: str
) -> None:
    killed = chaos.kill(pair, what, after_s=0.7, expected=plain)
    # That it happens; how fast is measured by make chaos, on a machine that does nothing else.
    print(killed)


@pytest.mark.parametrize("what", ["core", "worker"])
def test_who_waits_for_an_engine_hears_of_its_death(model: Path, tmp_path: Path, what: str) -> None:
    """A program with an engine of its own, which waits for the next output all the time."""
    job = {
        "task": "until_it_dies",
        "model": str(model),
        "prompts": PROMPTS,
        "max_tokens": MAX_TOKENS,
        "arguments": {},
    }
    changes = switched_on(tmp_path, 64 * MIB, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    with LlmProcess(tmp_path / "llm", job, changes) as process:
        assert process.answer(120) == {"error": None}
        with Ledger.open(tmp_path / "ledger", changes["KVCACHED_DEVICE"], create=False) as ledger:
            wait_until(lambda: any(a.in_use for a in ledger.snapshot().accounts), 30, "it works")
            (account,) = ledger.snapshot().accounts
            (member,) = account.members
            assert account.owner_pid is not None
            os.kill(account.owner_pid if what == "core" else member.pid, signal.SIGKILL)
            assert process.process.wait(timeout=20) == 0, process.log_tail()
            assert process.answer(1) == {"error": "EngineDeadError"}
            ledger.reap()
            assert ledger.snapshot().accounts == ()


def many(pair: Pair, plain: list[list[int]]) -> None:
    """Ten kills and ten stops of each kind at random moments; judged when all figures are there."""
    random_ = random.Random(20)
    quiet = chaos.undisturbed(pair, 60.0, plain)
    print(f"undisturbed: B's TTFT p99 {p99(quiet) * 1e3:.0f} ms of {len(quiet)}", flush=True)
    todo = [(kind, event) for kind in chaos.KINDS for event in ("kill", "stop") for _ in range(10)]
    random_.shuffle(todo)
    killed: list[chaos.Kill] = []
    beside_kills: list[float] = []
    beside_stops: list[float] = []
    for what, event in todo:
        after_s = random_.uniform(0.05, 2.5)
        if event == "stop":
            for_s = random_.uniform(0.2, 2.0)
            ttft_s = chaos.stop(pair, what, after_s, for_s, plain)
            beside_stops += ttft_s
            print(f"stop {what} {for_s:.1f} s: B's TTFT p99 {p99(ttft_s) * 1e3:.0f} ms", flush=True)
        else:
            killed.append(chaos.kill(pair, what, after_s, plain))
            beside_kills += killed[-1].b_ttft_s
            print(killed[-1], flush=True)
            pair.up()
    for name, values in {
        "instance ended after": [k.gone_s for k in killed],
        "worker's bytes leasable after its end": [k.free_s for k in killed],
        "all charges gone after that": [k.nothing_s for k in killed],
    }.items():
        print(f"{name}: median {median(values) * 1e3:.0f} ms, longest {max(values) * 1e3:.0f} ms")
    for name, values in {"kills": beside_kills, "stops": beside_stops, "nothing": quiet}.items():
        print(
            f"B's TTFT beside {name}: p99 {p99(values) * 1e3:.0f} ms of {len(values)}", flush=True
        )
    # Where all cores are busy, a dying process waits its turn like any other: one may be late.
    late = [k for k in killed if k.gone_s >= chaos.END_LIMIT_S]
    assert len(late) <= 1 and max(k.gone_s for k in killed) < 2 * chaos.END_LIMIT_S, late
    assert max(k.free_s for k in killed) < 0.1
    assert p99(beside_kills) <= 2 * p99(quiet)


@pytest.mark.slow
def test_many_stops_and_kills(pair: Pair, plain: list[list[int]]) -> None:
    many(pair, plain)


test_many_stops_and_kills.limit_s = 7200.0  # type: ignore[attr-defined]
