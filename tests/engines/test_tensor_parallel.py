"""An engine with two ranks, each on a device of its own: the same pages on both or on none."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from harness import MAX_TOKENS, MIB, PROMPTS, LlmProcess, Load, Server, switched_on, wait_until
from two_devices import TwoDevices, check_came_back, empty

from kvcached.ledger import Ledger

SMALL, LARGE = 3 * MIB, 5 * MIB


def job(model: Path, **more: Any) -> dict[str, Any]:
    arguments = {"tensor_parallel_size": 2, **more.pop("arguments")}
    return {
        "task": "equality",
        "model": str(model),
        "prompts": PROMPTS,
        "max_tokens": MAX_TOKENS,
        "arguments": arguments,
        **more,
    }


@dataclass
class Elastic:
    """A running engine, what it answered, and its two devices."""

    answer: dict[str, Any]
    devices: TwoDevices


@pytest.fixture(scope="module")
def elastic(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elastic]:
    """Rank 0 is on the larger device, which has the second name. When it starts, somebody holds all
    of the smaller one: it waits, says so, and goes on.
    """
    folder = tmp_path_factory.mktemp("tp")
    names = f"host:tp-a-{os.getpid()}", f"host:tp-b-{os.getpid()}"
    changes = switched_on(folder, 0, KVCACHED_DEVICE=",".join(reversed(names)), KVCACHED_NAME="tp")
    del changes["KVCACHED_CAPACITY"]
    with (
        Ledger.open(folder / "ledger", names[0], SMALL) as a,
        Ledger.open(folder / "ledger", names[1], LARGE) as b,
        a.join("holder", "holder") as holder,
        LlmProcess(
            folder / "llm",
            job(model, rounds=2, stay=True, arguments={"enable_prefix_caching": True}),
            {**changes, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        ) as process,
    ):
        assert holder.lease(SMALL)
        waits = f"on {names[0]} to start: all of it is in use (holder "
        wait_until(lambda: waits in process.log.read_text(errors="replace"), 120, waits)
        holder.close()
        yield Elastic(process.answer(200), TwoDevices("tp", (a, b)))


@pytest.fixture(scope="module")
def plain_tp(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """What vLLM without kvcached answers with two ranks: sums differ from those of one."""
    arguments = {"enable_prefix_caching": False, "kv_cache_memory_bytes": 64 * MIB}
    changes = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    folder = tmp_path_factory.mktemp("plain-tp")
    with LlmProcess(folder, job(model, rounds=1, arguments=arguments), changes) as process:
        outputs: list[list[int]] = process.answer(200)["outputs"][0]
    return outputs


def test_outputs_are_those_of_plain_vllm(elastic: Elastic, plain_tp: list[list[int]]) -> None:
    assert elastic.answer["outputs"] == [plain_tp, plain_tp]
    assert elastic.answer["preemptions"] > 0


def test_the_smaller_device_decides_and_everything_comes_back(elastic: Elastic) -> None:
    loaded = elastic.answer["loaded"]
    elastic.devices.check_both_hold(SMALL, loaded["page"] // 2)
    assert loaded["cached"] > 0
    check_came_back(loaded, elastic.answer["reset"])


@pytest.mark.parametrize("number", [0, 1])
def test_pressure_on_either_device_takes_cached_pages_from_both(
    elastic: Elastic, number: int
) -> None:
    elastic.devices.check_reclaim(number)


def test_the_death_of_a_rank_ends_the_instance_on_both_devices(elastic: Elastic) -> None:
    accounts = elastic.devices.accounts()
    pids = {pid for account in accounts for pid in account.pids}
    members = [member.pid for account in accounts for member in account.members]
    assert len(members) == 2 and len(pids) == 3, "two ranks and the scheduler"
    ends = [os.pidfd_open(pid) for pid in pids]
    os.kill(members[0], signal.SIGKILL)  # the second rank: its device comes first
    for end in ends:
        wait_until(lambda fd=end: _ended(fd), 10, "all processes end")  # type: ignore[misc]
        os.close(end)
    elastic.devices.check_empty(1)


@pytest.mark.slow
def test_ranks_on_one_device_have_one_account(
    model: Path, tmp_path: Path, plain_tp: list[list[int]]
) -> None:
    arguments = {"enable_prefix_caching": True}
    changes = switched_on(tmp_path, 2 * SMALL, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    with LlmProcess(
        tmp_path / "llm", job(model, rounds=2, arguments=arguments), changes
    ) as process:
        result = process.answer(200)
    assert result["outputs"] == [plain_tp, plain_tp] and result["preemptions"] > 0
    loaded = result["loaded"]
    assert SMALL < loaded["high_water"] <= loaded["capacity"] == 2 * SMALL
    check_came_back(loaded, result["reset"])


@pytest.mark.slow
def test_two_engines_in_opposite_order_both_get_on(
    model: Path, tmp_path: Path, plain_tp: list[list[int]]
) -> None:
    names = [f"host:tp-e-{os.getpid()}", f"host:tp-f-{os.getpid()}"]
    work = job(model, rounds=2, arguments={"enable_prefix_caching": True})
    with contextlib.ExitStack() as stack:
        engines = []
        for name, order in (("one", names), ("two", names[::-1])):
            changes = switched_on(
                tmp_path,
                SMALL,
                KVCACHED_DEVICE=",".join(order),
                KVCACHED_NAME=name,
                VLLM_ENABLE_V1_MULTIPROCESSING="1",
            )
            engines.append(stack.enter_context(LlmProcess(tmp_path / name, work, changes)))
        results = [engine.answer(230) for engine in engines]
    assert [result["outputs"] for result in results] == [[plain_tp, plain_tp]] * 2
    assert all(result["preemptions"] > 0 for result in results)
    for name in names:
        with Ledger.open(tmp_path / "ledger", name, create=False) as ledger:
            assert ledger.snapshot().high_water <= SMALL
            wait_until(lambda ledger=ledger: empty(ledger), 10, "both are gone")  # type: ignore[misc]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["api", "core", "rank 0", "rank 1"])
def test_the_death_of_any_process_ends_a_server_with_two_ranks(
    model: Path, tmp_path: Path, what: str
) -> None:
    names = f"host:tp-c-{os.getpid()}", f"host:tp-d-{os.getpid()}"
    changes = switched_on(
        tmp_path,
        SMALL,
        KVCACHED_DEVICE=",".join(names),
        KVCACHED_VIRTUAL=str(64 * MIB),
    )
    server = Server("tp", model, tmp_path, changes, "--tensor-parallel-size", "2")
    server.start()
    try:
        server.wait()
        with Load(server, 6):
            ledgers = [Ledger.open(tmp_path / "ledger", name, create=False) for name in names]
            accounts = [ledger.snapshot().account("tp") for ledger in ledgers]
            wait_until(lambda: ledgers[0].snapshot().charge > SMALL // 2, 60, "it works")
            owner, *ranks = (accounts[0].owner_pid, *(a.members[0].pid for a in accounts))  # type: ignore[union-attr]
            pids = {"api": server.session, "core": owner, "rank 0": ranks[0], "rank 1": ranks[1]}
            ends = {kind: os.pidfd_open(pid) for kind, pid in pids.items()}
            start = time.monotonic()
            os.kill(pids[what], signal.SIGKILL)
            wait_until(lambda: all(map(_ended, ends.values())), 10, "all processes end")
            print(f"kill {what}: all had ended after {time.monotonic() - start:.2f} s")
    finally:
        server.kill()
    for ledger in ledgers:
        wait_until(lambda ledger=ledger: empty(ledger), 10, "its bytes are back")  # type: ignore[misc]
        assert ledger.snapshot().high_water <= SMALL
        ledger.close()


def _ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
