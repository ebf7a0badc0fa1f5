"""What differs between two looks at a real ledger, and a folder that changes under who looks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from ledger_process import Remote, wait_until

from kvcached.events import KINDS, Event, between
from kvcached.ledger import Ledger
from kvcached.observe import Observer
from kvcached.vmm_ops import remove_ledger

DEVICE = "host:test"
MIB = 1 << 20


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "ledger", DEVICE, 100 * MIB) as opened:
        yield opened


class Looks:
    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.last = ledger.snapshot()

    def events(self) -> list[Event]:
        before, self.last = self.last, self.ledger.snapshot()
        return list(between(before, self.last))

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events()]


def test_an_instance_from_its_start_to_its_end(ledger: Ledger) -> None:
    looks = Looks(ledger)
    account = ledger.join("id-1", "chat")
    (joined,) = looks.events()
    assert (joined.kind, joined.instance, joined.name) == ("joined", "id-1", "chat")
    assert joined.figures["limit"] is None
    account.set_ready()
    assert looks.kinds() == ["ready"]
    assert looks.kinds() == []
    account.set_asleep(True)
    assert looks.kinds() == ["asleep"]
    account.set_asleep(False)
    assert looks.kinds() == ["awake"]
    ledger.set_limit("chat", 40 * MIB)
    ledger.set_weight("chat", 2.5)
    limit, weight = looks.events()
    assert limit.figures == {"before": None, "after": 40 * MIB}
    assert str(limit) == "host:test: chat: limit (before none, after 40 MiB)"
    assert str(weight) == "host:test: chat: weight (before 1, after 2.5)"
    ledger.set_capacity(90 * MIB)
    assert looks.events()[0].figures == {"capacity": 90 * MIB, "headroom": 0}
    account.close()
    assert looks.kinds() == ["left"]


def test_shortage_waits_and_reclaim(ledger: Ledger) -> None:
    account, other = ledger.join("a", "a"), ledger.join("b", "b")
    looks = Looks(ledger)
    assert account.lease(99 * MIB) and looks.kinds() == []
    other.set_demand(2 * MIB)
    for _ in range(3):
        assert not other.lease(2 * MIB)
    (refused,) = looks.events()
    assert (refused.kind, refused.name) == ("refused", "b")
    assert refused.figures == {"count": 3, "demand": 2 * MIB}
    account.give_back(3 * MIB)
    account.publish_cache(0, 10, 7, 4)
    account.count_reclaimed(3 * MIB)
    assert other.lease(2 * MIB)
    reclaim, waited = looks.events()
    assert (reclaim.kind, reclaim.figures) == ("reclaim", {"size": 3 * MIB, "cached_blocks": 4})
    assert waited.kind == "waited" and waited.figures["count"] == 1
    assert re.search(r"waited \(count 1, waited \d+\.\d ms\)$", str(waited))
    for each in (account, other):
        each.close()


def test_a_killed_instance_dies_and_is_reaped(ledger: Ledger, tmp_path: Path) -> None:
    looks = Looks(ledger)
    remote = Remote(tmp_path / "ledger")
    remote.run("account = ledger.join('id', 'chat')", "account.lease(5 << 20)")
    assert looks.kinds() == ["joined"]
    remote.kill()
    wait_until(lambda: not ledger.snapshot().accounts[0].alive)
    (died,) = looks.events()
    assert (died.kind, died.figures) == ("died", {"pid": remote.pid})
    assert ledger.reap() == 1
    assert looks.kinds() == ["reaped"]


def test_a_death_between_two_looks_is_no_clean_end(ledger: Ledger, tmp_path: Path) -> None:
    remote = Remote(tmp_path / "ledger")
    remote.run("account = ledger.join('id', 'chat')")
    looks = Looks(ledger)
    remote.kill()
    wait_until(lambda: ledger.reap() > 0)
    assert looks.kinds() == ["died", "reaped"]


def test_memory_set_aside(ledger: Ledger) -> None:
    member = ledger.attach("h", "hold")
    looks = Looks(ledger)
    assert member.set_aside(8 * MIB)
    (aside,) = looks.events()
    assert (aside.kind, aside.figures) == ("set aside", {"before": 0, "after": 8 * MIB})
    member.close()


def test_the_first_look_says_what_is_there(ledger: Ledger) -> None:
    account = ledger.join("id", "chat")
    account.set_ready()
    found = list(between(None, ledger.snapshot()))
    assert [event.kind for event in found] == ["ledger", "joined", "ready"]
    assert {event.kind for event in found} <= KINDS.keys()
    account.close()


def test_an_observer_follows_ledgers_that_come_go_and_are_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "ledger"
    with Observer(folder) as looks:
        assert looks.read() == [] and looks.problems == {}
        with Ledger.open(folder, DEVICE, 100 * MIB):
            assert [each.capacity for each in looks.read()] == [100 * MIB]
            with Ledger.open(folder, "host:other", MIB):
                assert [each.device for each in looks.read()] == ["host:other", DEVICE]
        remove_ledger(str(folder), DEVICE)
        assert [each.device for each in looks.read()] == ["host:other"]
        with Ledger.open(folder, DEVICE, 50 * MIB):
            assert [each.capacity for each in looks.read()] == [MIB, 50 * MIB]
            (folder / "ledger-host-other").write_bytes(b"x" * 200)
            assert [each.device for each in looks.read()] == [DEVICE]
            assert "cut while in use" in looks.problems["host:other"]


def test_an_observer_of_named_devices_says_which_are_missing(tmp_path: Path) -> None:
    with Observer(tmp_path, ("host:none",)) as looks:
        assert looks.read() == [] and "host:none" in looks.problems
