"""What only the host backend promises: real shortage, faults on holes, forks, descriptors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from devices import HostDevice

from kvcached import vmm_ops
from kvcached.errors import InvalidArgumentError, OutOfMemoryError, UnavailableError

PRELUDE = """
import ctypes, os, resource, signal, sys
from pathlib import Path
sys.path.insert(0, {folder!r})
from devices import HostDevice
from kvcached import vmm_ops
from kvcached.errors import InvalidArgumentError, OutOfMemoryError
device = HostDevice()
chunk = device.chunk
arena = vmm_ops.Arena(device.backend, [(0, chunk)], 64, 64 * chunk)
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    """Runs a program in a process of its own, with a device and an arena of 64 pages."""
    prelude = PRELUDE.format(folder=str(Path(__file__).parent))
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", prelude + textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_shortage_is_an_error_and_changes_nothing() -> None:
    """A limit on the process's file size makes the kernel itself refuse to allocate more."""
    result = run("""
        resource.setrlimit(resource.RLIMIT_FSIZE, (10 * chunk, 10 * chunk))
        arena.map([0, 1, 2])
        device.write(arena.address, 7, 3 * chunk)
        for _ in range(3):
            try:
                arena.map(list(range(10, 30)))
            except OutOfMemoryError as error:
                assert "page 16" in str(error) and isinstance(error, MemoryError), error
            else:
                sys.exit("no shortage")
            assert arena.mapped_pages() == [0, 1, 2]
            assert arena.created_bytes() == device.physical_bytes() == 3 * chunk
            arena.check()
        assert device.read(arena.address, 3 * chunk) == bytes([7]) * (3 * chunk)
        arena.map([10, 11, 12, 13, 14, 15])
        arena.unmap([0])
        arena.map([63])
    """)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("state", ["never mapped", "unmapped again"])
def test_touching_a_hole_faults_at_that_address(state: str) -> None:
    result = run(f"""
        arena.map([4, 5, 6])
        arena.unmap([5])
        page = {2 if state == "never mapped" else 5}
        print(arena.address, arena.size, arena.address + page * chunk + 100, flush=True)

        @ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.POINTER(ctypes.c_uint64), ctypes.c_void_p)
        def report(number, info, context):
            os.write(1, str(info[2]).encode())  # siginfo_t.si_addr lies at byte 16
            os._exit(42)

        class Action(ctypes.Structure):
            _fields_ = [("handler", ctypes.c_void_p), ("mask", ctypes.c_byte * 128),
                        ("flags", ctypes.c_int), ("restorer", ctypes.c_void_p)]

        action = Action(ctypes.cast(report, ctypes.c_void_p).value, flags=4)  # SA_SIGINFO
        assert ctypes.CDLL(None).sigaction(signal.SIGSEGV, ctypes.byref(action), None) == 0
        ctypes.string_at(arena.address + page * chunk + 100, 1)
    """)
    assert result.returncode == 42, result.stderr
    address, size, touched, faulted = map(int, result.stdout.split())
    assert address <= faulted < address + size
    assert faulted == touched


def test_touching_a_hole_ends_the_process() -> None:
    result = run("ctypes.memset(arena.address, 1, 1)")
    assert result.returncode == -signal.SIGSEGV


@pytest.mark.parametrize("ending", ["sys.exit(0)", "os._exit(0)"])
def test_a_forked_child_leaves_the_parents_memory_alone(ending: str) -> None:
    """The child drops every object, destructors included, and has neither mapping nor memfd."""
    result = run(f"""
        pooled = vmm_ops.Arena(device.backend, [(0, chunk)], 8, 8 * chunk, pool_bytes=4 * chunk)
        pooled.map([0, 1]); pooled.unmap([1])
        arena.map([1, 2, 9])
        device.write(arena.address + chunk, 0x33, 2 * chunk)
        child = os.fork()
        if child == 0:
            assert list(device.descriptors()) == []
            assert "memfd:kvcached" not in Path("/proc/self/maps").read_text()
            for call in (lambda: arena.map([5]), lambda: arena.unmap([1]), arena.mapped_pages,
                         lambda: arena.is_mapped(1), arena.check, device.backend.live_handles,
                         lambda: arena.tensor(0, chunk), arena.trim,
                         lambda: vmm_ops.Arena(device.backend, [(0, chunk)], 1, chunk)):
                try:
                    call()
                except InvalidArgumentError as error:
                    assert "fork" in str(error), error
                else:
                    raise AssertionError("a child may not")
            own = HostDevice()
            mine = vmm_ops.Arena(own.backend, [(0, chunk)], 4, 4 * chunk)
            mine.map([0])
            own.write(mine.address, 1, chunk)
            del arena, pooled, mine
            device.backend = None
            {ending}
        _, status = os.waitpid(child, 0)
        assert status == 0, status
        assert device.read(arena.address + chunk, 2 * chunk) == bytes([0x33]) * (2 * chunk)
        assert device.physical_bytes() == device.backend.created_bytes() == 5 * chunk
        arena.check()
        arena.unmap([1, 2, 9])
        arena.map([3])
        assert device.read(arena.address + 3 * chunk, chunk) == bytes(chunk)
    """)
    assert result.returncode == 0, result.stderr


def test_memfd_is_lazy_closed_on_exec_and_numbered_above_what_is_asked() -> None:
    device = HostDevice()
    device.backend = vmm_ops.host_backend(device.name, min_fd=200)
    arena = vmm_ops.Arena(device.backend, [(0, device.chunk)], 2, 2 * device.chunk)
    assert list(device.descriptors()) == []
    arena.map([0])
    (descriptor,) = device.descriptors()
    assert descriptor > 200
    assert not os.get_inheritable(descriptor)
    del arena
    device.backend = vmm_ops.host_backend("another")
    assert list(device.descriptors()) == []


def test_descriptor_that_cannot_be_had_is_an_error() -> None:
    backend = vmm_ops.host_backend("conformance", min_fd=1 << 30)
    arena = vmm_ops.Arena(backend, [(0, 4096)], 1, 4096)
    with pytest.raises(Exception, match="a descriptor above 1073741824"):
        arena.map([0])
    arena.check()


@pytest.mark.parametrize("name", ["", "x" * 201, "a\0b"])
def test_names_that_a_memfd_cannot_have_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match="host backend: a name"):
        vmm_ops.host_backend(name)


def test_addresses_that_cannot_be_had_are_a_shortage() -> None:
    backend = vmm_ops.host_backend("conformance")
    with pytest.raises(OutOfMemoryError, match="reserving"):
        vmm_ops.Arena(backend, [(0, 4096)], 1, 1 << 56)


def test_extents_of_different_sizes_share_the_file() -> None:
    """Freed places are used again, whole or in part, so the file does not grow without end."""
    device = HostDevice()
    unit = device.chunk
    small = vmm_ops.Arena(device.backend, [(0, unit)], 12, 12 * unit)
    large = vmm_ops.Arena(device.backend, [(0, 3 * unit)], 4, 12 * unit)
    for _ in range(5):
        small.map(list(range(12)))
        small.unmap(list(range(0, 12, 2)))
        large.map([0, 1])
        small.unmap(list(range(1, 12, 2)))
        large.map([2, 3])
        large.unmap([0, 1, 2, 3])
    assert device.physical_bytes() == 0
    small.map([0])
    (descriptor,) = device.descriptors()
    assert os.fstat(descriptor).st_size <= 25 * unit


def fake_kernel(folder: Path, cgroup: str) -> None:
    (folder / "self").mkdir(parents=True)
    (folder / "meminfo").write_text("MemTotal: 1000 kB\nMemFree: 5 kB\nMemAvailable: 600 kB\n")
    (folder / "self" / "cgroup").write_text(cgroup)


def test_memory_is_the_machines_without_limits(tmp_path: Path) -> None:
    fake_kernel(tmp_path / "proc", "0::/\n")
    found = vmm_ops.host_memory_info(str(tmp_path / "proc"), str(tmp_path / "cgroup"))
    assert found == (600 * 1024, 1000 * 1024)


def test_memory_is_cut_by_every_cgroup_above(tmp_path: Path) -> None:
    fake_kernel(tmp_path / "proc", "0::/outer/inner\n")
    inner = tmp_path / "cgroup" / "outer" / "inner"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.current").write_text("100000\n")
    (inner.parent / "memory.max").write_text("400000\n")
    (inner.parent / "memory.current").write_text("300000\n")
    (inner.parent / "memory.stat").write_text("anon 1\ninactive_file 50000\n")
    found = vmm_ops.host_memory_info(str(tmp_path / "proc"), str(tmp_path / "cgroup"))
    assert found == (150000, 400000)


def test_memory_is_cut_by_cgroups_of_version_1(tmp_path: Path) -> None:
    fake_kernel(tmp_path / "proc", "5:cpu,memory:/box\n0::/\nnonsense\n")
    box = tmp_path / "cgroup" / "memory" / "box"
    box.mkdir(parents=True)
    (box / "memory.limit_in_bytes").write_text("500000\n")
    (box / "memory.usage_in_bytes").write_text("600000\n")
    found = vmm_ops.host_memory_info(str(tmp_path / "proc"), str(tmp_path / "cgroup"))
    assert found == (0, 500000)


def test_memory_of_a_kernel_that_does_not_say_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="meminfo"):
        vmm_ops.host_memory_info(str(tmp_path), str(tmp_path))
