"""Models that have a GPU one at a time, in processes of their own: the benchmark's turns."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"))

import turns as module
from turns import Turns


class Gpu:
    """Who is awake; two at once is an error."""

    def __init__(self, path: Path, models: int) -> None:
        self.awake: list[int] = []
        self.most = 0
        self.order: list[int] = []
        self.turns = [
            Turns(path, i, models, lambda i=i: self._wake(i), lambda i=i: self.awake.remove(i))  # type: ignore[misc]
            for i in range(models)
        ]

    def _wake(self, index: int) -> None:
        self.awake.append(index)
        self.order.append(index)
        self.most = max(self.most, len(self.awake))


@pytest.fixture
def gpu(tmp_path: Path) -> Gpu:
    return Gpu(tmp_path / "turns", 3)


def test_who_comes_first_keeps_it_while_nobody_waits(gpu: Gpu) -> None:
    first, second, _ = gpu.turns
    assert first.may_go_on(0.0, runs=False) and gpu.awake == [0]
    assert not first.may_go_on(None, runs=False) and gpu.awake == [0], "nobody wants it"
    assert not second.may_go_on(time.monotonic(), runs=False)
    assert first.may_go_on(None, runs=True), "requests run"
    assert not first.may_go_on(None, runs=False) and gpu.awake == []
    assert second.may_go_on(time.monotonic(), runs=False) and gpu.awake == [1]
    assert gpu.most == 1 and len(second.wakes) == 1


def test_who_has_waited_longest_is_next(gpu: Gpu) -> None:
    first, second, third = gpu.turns
    assert first.mine(1.0)
    assert not second.mine(3.0) and not third.mine(2.0)
    first.leave()
    assert not second.mine(3.0) and third.mine(2.0) and gpu.order == [0, 2]
    third.leave()
    assert second.mine(3.0)


def test_a_busy_one_hurries_once_others_have_waited(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.05)
    first, second, _ = gpu.turns
    assert first.mine(time.monotonic()) and not second.mine(time.monotonic())
    assert not first.hurries(), "neither has had its time"
    time.sleep(0.06)
    assert first.hurries() and first.may_go_on(0.0, runs=True), "what runs, ends"
    assert not first.may_go_on(0.0, runs=False) and gpu.awake == []
    assert second.mine(0.0) and not second.hurries()


def test_who_left_with_the_turn_hands_it_on_asleep(gpu: Gpu) -> None:
    first, second, _ = gpu.turns
    assert first.mine(1.0) and not second.mine(2.0)
    second._set(1 + 1, 2.0)
    first.pass_on()  # to the second, which has gone meanwhile
    assert not first.mine(3.0)
    second.leave()
    assert first.mine(3.0) and gpu.order == [0, 0]


def test_nobody_starves_and_two_are_never_awake(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.02)
    done = [0, 0, 0]

    def work(index: int) -> None:
        mine = gpu.turns[index]
        while done[index] < 200:
            if mine.may_go_on(0.0, runs=False):
                done[index] += 1
                time.sleep(0.001)
        mine.leave()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert done == [200] * 3 and gpu.most == 1 and gpu.awake == []
