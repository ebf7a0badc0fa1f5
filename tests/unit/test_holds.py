"""Room for programs that are no engines: kept from leases, never counted twice, gone with them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from ledger_process import CAPACITY, Remote, wait_until
from page_pools import PAGE, PER_PAGE, Instance

import kvcached
from kvcached import devices, foreign
from kvcached.config import Config
from kvcached.errors import ConfigError, InvalidArgumentError, LedgerError, OutOfMemoryError
from kvcached.holds import Hold
from kvcached.ledger import Ledger

DEVICE = "host:test"
PAGES = 16


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVCACHED_DIR", str(tmp_path / "ledger"))
    monkeypatch.setenv("KVCACHED_DEVICE", DEVICE)
    return tmp_path / "ledger"


@pytest.fixture
def ledger(directory: Path) -> Iterator[Ledger]:
    with Ledger.open(directory, DEVICE, PAGES * PAGE) as opened:
        yield opened


class Follower:
    """An idle engine's manners: it gives back when the pressure rises."""

    def __init__(self, one: Instance) -> None:
        self._one = one
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        account = self._one.account
        seen = account.pressure_seq
        while not self._over.is_set():
            self._one.now_s += 1.0
            if self._one.pool.relieve():
                self._one.carry()
            seen = account.wait_pressure(seen, 0.02)

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def full_of_cache(ledger: Ledger, used_pages: int = 0) -> Instance:
    """An instance that holds all there is; so many pages of it are in use."""
    one = Instance(ledger, "one")
    held = one.alloc((PAGES - 1) * PER_PAGE)
    one.carry()
    one.blocks.free(held[used_pages * PER_PAGE :], cached=True)
    one.pool.publish()
    assert one.charged_pages == PAGES
    return one


def test_cached_memory_goes_back_and_is_kept_from_leases(ledger: Ledger) -> None:
    one = full_of_cache(ledger)
    with Follower(one):
        with kvcached.hold(5 * PAGE, timeout_s=5) as held:
            assert held.left() == 5 * PAGE
            assert one.charged_pages == PAGES - 5
            assert not one.account.lease(PAGE)
            seen = ledger.snapshot()
            assert (seen.free, seen.set_aside) == (0, 5 * PAGE)
        assert ledger.snapshot().set_aside == 0
        assert one.account.lease(5 * PAGE)


def test_memory_in_use_is_waited_for_and_not_taken(ledger: Ledger) -> None:
    one = full_of_cache(ledger, used_pages=8)
    with Follower(one):
        words = r"640 KiB of .* did not come free within 0.1 s: one .* in use"
        with pytest.raises(OutOfMemoryError, match=words):
            kvcached.hold(f"{10 * PAGE}", timeout_s=0.1)
        assert ledger.snapshot().set_aside == 0 and len(ledger.snapshot().accounts) == 1
        assert one.blocks.used_blocks == 1 + 8 * PER_PAGE


def test_what_can_never_be_free_is_refused_with_both_numbers(ledger: Ledger) -> None:
    one = Instance(ledger, "one")
    ledger.set_guarantee("one", 4 * PAGE)
    for size in (0, 13 * PAGE, "1TiB"):
        with pytest.raises(InvalidArgumentError, match="at most 768 KiB"):
            Hold(size)
    with pytest.raises(ConfigError, match="size"):
        Hold("much")
    assert one.charged_pages == 1 and len(ledger.snapshot().accounts) == 1


def test_a_hold_ends_with_its_process(directory: Path) -> None:
    ledger = Ledger.open(directory, DEVICE, CAPACITY)
    remote = Remote(directory, DEVICE)
    try:
        remote.run("from kvcached.holds import Hold", f"kept = Hold({3 * PAGE})", "kept.wait()")
        (account,) = ledger.snapshot().accounts
        assert account.kept == 3 * PAGE and account.name == f"hold-{remote.pid}"
        one = ledger.join("one", "one")
        assert one.leasable() == CAPACITY - 3 * PAGE
    finally:
        remote.kill()
    assert wait_until(lambda: one.lease(CAPACITY)) < 1
    ledger.close()


def test_on_a_gpu_what_the_program_takes_is_not_kept_twice(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device says how much is in use; nobody has to give more when the program has it."""
    used = [0]
    monkeypatch.setattr(devices, "memory_of", lambda device: lambda: (used[0], 100))
    with Ledger.open(directory, DEVICE, 100) as ledger:
        account, member = ledger.join("one", "one"), ledger.attach("one", "one")
        assert account.lease(40)
        member.created(40)
        used[0] = 40
        with Hold(50) as held:
            assert held.wait(1) and held.left() == 50
            for taken in (20, 50, 55, 10):
                used[0] = 40 + taken
                foreign.refresh(ledger, lambda: (used[0], 100))
                assert held.left() == max(0, 50 - taken)
                assert ledger.snapshot().free == min(10, 60 - taken)
                assert not account.pressed()
        assert ledger.snapshot().free == 50


def test_on_a_gpu_it_waits_until_the_device_has_it(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that nobody governs holds the memory, and ends after a while."""
    used = [70]
    monkeypatch.setattr(devices, "memory_of", lambda device: lambda: (used[0], 100))
    with Ledger.open(directory, DEVICE, 100), Hold(50) as held:
        assert not held.wait(0.1)
        used[0] = 10
        assert held.wait(1)


def test_a_smaller_capacity_lies_beside_foreign_memory(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a hold, only what does not fit beside the ledger's part is kept from leases."""
    monkeypatch.setattr(devices, "memory_of", lambda device: lambda: (10, 100))
    with Ledger.open(directory, DEVICE, 60) as ledger, Hold(50) as held:
        assert held.wait(1)
        assert held.left() == 20 and ledger.snapshot().free == 40


def test_the_device_is_found_or_must_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "ledger"
    config = Config(directory=here)
    monkeypatch.setattr(devices.nvml, "_LIBRARY", "libnone.so")
    assert devices.shared(here) == []
    assert devices.find(config) == "host:default"
    assert devices.find(config, "host:other") == "host:other"
    with Ledger.open(here, "host:a-b", 100):
        assert devices.find(config) == "host:a-b"
    with Ledger.open(here, "GPU-12-34", 100):
        assert devices.shared(here) == ["GPU-12-34", "host:a-b"]
    with pytest.raises(ConfigError, match="GPU-12-34, host:a-b"):
        devices.find(config)
    assert devices.find(Config(directory=here, devices=("host:x",))) == "host:x"


def test_without_an_engine_the_ledger_is_made_as_an_engine_would(directory: Path) -> None:
    with kvcached.hold(PAGE) as held:
        assert held.left() == PAGE
    with Ledger.open(directory, DEVICE, create=False) as ledger:
        assert ledger.capacity > PAGE
    ledger_file = next(directory.iterdir())
    ledger_file.write_bytes(b"no ledger")
    with pytest.raises(LedgerError, match=r"not a ledger|bytes"):
        kvcached.hold(PAGE)


def test_importing_kvcached_brings_no_core() -> None:
    """Engines import the package with kvcached switched off."""
    import subprocess
    import sys

    script = "import sys, kvcached; print([m for m in sys.modules if m.startswith('kvcached')])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "['kvcached']"
    assert sorted(kvcached.__all__) == ["__version__", "hold", "open_pool"]
