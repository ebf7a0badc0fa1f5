"""Which models are short of memory, read from real ledgers."""

from __future__ import annotations

import os
from pathlib import Path

import httpx
import pytest
from router_runs import Running, ToyEngine, serve_settings, wait_until

from kvcached.ledger import Ledger
from kvcached.observe import Observer
from kvcached.router.app import Router
from kvcached.router.fixed import FixedUpstream
from kvcached.router.memory import HOLD_S, Pressure
from kvcached.snapshot import LedgerSnapshot

MIB = 1 << 20


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_a_device_is_short_while_a_demand_stands_and_a_little_longer(tmp_path: Path) -> None:
    clock = Clock()
    device, other = f"host:one-{os.getpid()}", f"host:two-{os.getpid()}"
    with (
        Ledger.open(tmp_path, device, 8 * MIB) as ledger,
        Ledger.open(tmp_path, other, 8 * MIB) as elsewhere,
        Observer(tmp_path) as observer,
    ):
        a, b = ledger.join("i-a", "a"), ledger.join("i-b", "b")
        elsewhere.join("i-c", "c")
        pressure = Pressure(observer.read, clock)
        assert not pressure.look() and pressure.short == {}
        assert a.lease(8 * MIB)
        assert not pressure.look()  # full, and nobody wants more
        b.set_demand(2 * MIB)
        assert pressure.look()
        assert pressure.short == {"a": device, "b": device}
        assert not pressure.look()
        b.set_demand(0)
        clock.now_s += HOLD_S / 2
        assert not pressure.look() and pressure.short
        clock.now_s += HOLD_S
        assert pressure.look() and pressure.short == {}


def test_no_ledger_is_no_shortage(tmp_path: Path) -> None:
    with Observer(tmp_path / "nowhere") as observer:
        assert not Pressure.of(observer).look()


def test_a_fault_while_reading_is_said_and_requests_go_on(caplog: pytest.LogCaptureFixture) -> None:
    def read() -> list[LedgerSnapshot]:
        raise ValueError("a fault of ours")

    toys = [ToyEngine(), ToyEngine()]
    try:
        upstreams = [FixedUpstream(n, e.url) for n, e in zip("ab", toys, strict=True)]
        with Running(Router(serve_settings(), upstreams, pressure=Pressure(read))) as router:
            wait_until(lambda: "a fault of ours" in caplog.text, 5, "it is logged")
            answer = httpx.post(router.url + "/v1/completions", json={"model": "a"})
            assert answer.status_code == 200
    finally:
        for toy in toys:
            toy.kill()
