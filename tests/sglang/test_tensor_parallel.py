"""An SGLang engine with two ranks, each on a device of its own: the same pages on both or on none,
decided alike by two schedulers.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sgl_harness import MIB, Engine, switched_on, wait_until
from two_devices import TwoDevices, check_came_back

from kvcached.engines.sglang import adapter
from kvcached.ledger import Ledger

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        adapter.running_version().startswith("0.4"),
        reason="SGLang 0.4 gathers wrong logits from two ranks on a CPU without its kernels",
    ),
]

SMALL, LARGE = 2 * MIB, 3 * MIB  # far less than all requests need at once
CORES = sorted(os.sched_getaffinity(0))
RANKS = {
    # SGLang wants to know which cores a rank may use where there are fewer NUMA nodes than ranks.
    "SGLANG_CPU_OMP_THREADS_BIND": f"{CORES[0]}|{CORES[-1]}",
    "GLOO_SOCKET_IFNAME": "lo",  # ranks meet on this machine, whatever its name resolves to
}


def job(model: Path, **more: Any) -> dict[str, Any]:
    arguments = {"tp_size": 2, **more.pop("arguments", {})}
    return {"task": "equality", "model": str(model), "arguments": arguments, **more}


@dataclass
class Elastic:
    """A running engine, what it answered, and its two devices."""

    process: Engine
    answer: dict[str, Any]
    devices: TwoDevices


@pytest.fixture(scope="module")
def elastic(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elastic]:
    """Rank 0 is on the larger device, which has the second name."""
    folder = tmp_path_factory.mktemp("tp")
    names = f"host:tp-a-{os.getpid()}", f"host:tp-b-{os.getpid()}"
    changes = switched_on(folder, 0, "tp", KVCACHED_VIRTUAL=str(64 * MIB), **RANKS)
    del changes["KVCACHED_CAPACITY"]
    changes["KVCACHED_DEVICE"] = ",".join(reversed(names))
    with (
        Ledger.open(folder / "ledger", names[0], SMALL) as a,
        Ledger.open(folder / "ledger", names[1], LARGE) as b,
        Engine(folder / "engine", job(model, stay=True), changes) as process,
    ):
        yield Elastic(process, process.answer(), TwoDevices("tp", (a, b)))


def test_outputs_are_those_of_transformers(elastic: Elastic, reference: list[list[int]]) -> None:
    assert elastic.answer["outputs"] == [reference, reference]


def test_the_smaller_device_decides_and_everything_comes_back(elastic: Elastic) -> None:
    loaded = elastic.answer["loaded"]
    elastic.devices.check_both_hold(SMALL, loaded["page"] // 2)
    assert loaded["cached"] > 0 and loaded["evictions"] > 0
    check_came_back(loaded, elastic.answer["reset"])


@pytest.mark.parametrize("number", [0, 1])
def test_pressure_on_either_device_takes_cached_pages_from_both(
    elastic: Elastic, number: int
) -> None:
    elastic.devices.check_reclaim(number)


def test_the_death_of_a_rank_ends_the_other_and_its_bytes_come_back(elastic: Elastic) -> None:
    accounts = elastic.devices.accounts()
    members = [member.pid for account in accounts for member in account.members]
    owners = {account.owner_pid for account in accounts}
    assert len({*members}) == 2 and owners == {members[1]}, "rank 0 owns both accounts"
    os.kill(members[0], signal.SIGKILL)  # the second rank
    wait_until(lambda: not {*members} & {*elastic.process.processes()}, 10, "both ranks end")
    elastic.devices.check_empty(5)


@pytest.mark.matrix
@pytest.mark.parametrize("arguments", [{}, {"page_size": 16, "chunked_prefill_size": 128}])
def test_ranks_on_one_device_have_one_account(
    model: Path, tmp_path: Path, reference: list[list[int]], arguments: dict[str, Any]
) -> None:
    changes = switched_on(tmp_path, 2 * SMALL, KVCACHED_VIRTUAL=str(64 * MIB), **RANKS)
    with Engine(tmp_path / "engine", job(model, arguments=arguments), changes) as process:
        result = process.answer()
    assert result["outputs"] == [reference, reference]
    loaded = result["loaded"]
    assert SMALL < loaded["high_water"] <= loaded["capacity"] == 2 * SMALL
    check_came_back(loaded, result["reset"])
