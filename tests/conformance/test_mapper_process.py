"""The mapping thread and its process: forks, exits, signals. Each in a process of its own."""

from __future__ import annotations

import pytest
from test_host import run

PRELUDE = """
        import tempfile, threading, time
        from kvcached.ledger import Ledger
        ledger = Ledger.open(Path(tempfile.mkdtemp()) / "ledger", "host:mapper", 64 * chunk)
        member = ledger.attach("one", "one", chunk)
        account = ledger.join("one", "one", chunk)
        arena = vmm_ops.Arena(device.backend, [(0, chunk)], 64, 64 * chunk, pool_bytes=64 * chunk)
        mapper = vmm_ops.Mapper(arena, member.core)
        assert account.lease(8 * chunk)
        mapper.submit([], [1, 2, 3, 4])
        assert mapper.wait([1, 2, 3, 4], 20)
"""


@pytest.mark.parametrize("ending", ["sys.exit(0)", "os._exit(0)"])
@pytest.mark.parametrize("busy", [False, True])
def test_a_forked_child_has_no_mapper(ending: str, busy: bool) -> None:
    """The child drops every object, destructors included, whatever the thread was at."""
    result = run(f"""{PRELUDE}
        if {busy}:
            device.backend.hold_fences()  # the thread polls, and may hold its lock
        mapper.submit([4], [5], [6])
        for _ in range(20):
            child = os.fork()
            if child == 0:
                for call in (lambda: mapper.submit([], [7]), lambda: mapper.wait([1], 1),
                             lambda: mapper.drain(1), lambda: mapper.need([7]), mapper.clear,
                             mapper.counters, mapper.quarantined_bytes, mapper.check,
                             lambda: mapper.missing([1]), lambda: mapper.give_up([1])):
                    try:
                        call()
                    except InvalidArgumentError as error:
                        assert "fork" in str(error), error
                    else:
                        raise AssertionError("a child may not")
                mapper.close()
                del mapper, arena, member, account, ledger
                device.backend = None
                {ending}
            assert os.waitpid(child, 0)[1] == 0
        device.backend.pass_fences()
        assert mapper.drain(20) and arena.mapped_pages() == [1, 2, 3, 5, 6]
        mapper.check()
        assert member.held() == device.physical_bytes() == 5 * chunk
    """)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("state", ["idle", "held", "busy", "refused", "closed"])
def test_an_interpreter_ends_with_its_mapper(state: str) -> None:
    """At once, and without a word, whatever the thread is at."""
    result = run(f"""{PRELUDE}
        keep = [mapper, arena, threading.local()]
        sys.modules["kept"] = keep  # not collected before the interpreter is gone
        if "{state}" == "held":
            device.backend.hold_fences()
            mapper.submit([1, 2], [], [9])
        elif "{state}" == "busy":
            mapper.submit([1, 2], [], [9, 10, 11])
        elif "{state}" == "refused":
            device.backend.inject(1, times=1000000)
            mapper.submit([], [9])
        elif "{state}" == "closed":
            mapper.close()
        start = time.monotonic()
        import atexit
        atexit._run_exitfuncs()
        assert time.monotonic() - start < 1, "it waited"
        assert not [t for t in os.listdir("/proc/self/task")
                    if "kvcached-map" in Path(f"/proc/self/task/{{t}}/comm").read_text()]
    """)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_sleeping_thread_costs_nothing_and_takes_no_signals() -> None:
    result = run(f"""{PRELUDE}
        (thread,) = [Path(f"/proc/self/task/{{t}}") for t in os.listdir("/proc/self/task")
                     if "kvcached-map" in Path(f"/proc/self/task/{{t}}/comm").read_text()]
        def switches():
            return [line for line in (thread / "status").read_text().splitlines()
                    if "ctxt_switches" in line]
        assert mapper.drain(20)
        time.sleep(0.1)
        before = switches()
        time.sleep(0.5)
        assert switches() == before, "it polls although nothing is outstanding"
        blocked = int(dict(line.split(":\\t") for line in
                           (thread / "status").read_text().splitlines())["SigBlk"], 16)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            assert blocked >> (number - 1) & 1, number
        assert not blocked >> (signal.SIGSEGV - 1) & 1
    """)
    assert result.returncode == 0, result.stderr
