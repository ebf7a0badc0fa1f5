"""default_capacity: the machine's memory, and cgroups of both versions, from made-up files."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcached.hostmemory import available_memory, default_capacity
from kvcached.units import GIB


def _machine(root: Path, cgroup: str = "", **files: str) -> Path:
    files = {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {16 * GIB // 1024} kB\n", **files}
    if cgroup:
        files["proc/self/cgroup"] = cgroup
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_cgroups(tmp_path: Path) -> None:
    assert default_capacity(_machine(tmp_path)) == 8 * GIB


def test_version_2_limit_counts_what_is_used_and_cannot_be_dropped(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/pod/app"
    root = _machine(
        tmp_path,
        "0::/pod/app\n",
        **{
            f"{folder}/memory.max": f"{4 * GIB}\n",
            f"{folder}/memory.current": f"{3 * GIB}\n",
            f"{folder}/memory.stat": f"anon 1\ninactive_file {GIB}\n",
        },
    )
    assert available_memory(root) == 2 * GIB


def test_version_2_a_parent_may_be_tighter(tmp_path: Path) -> None:
    root = _machine(
        tmp_path,
        "0::/pod/app\n",
        **{
            "sys/fs/cgroup/pod/app/memory.max": "max\n",
            "sys/fs/cgroup/pod/app/memory.current": "0\n",
            "sys/fs/cgroup/pod/memory.max": f"{2 * GIB}\n",
            "sys/fs/cgroup/pod/memory.current": "0\n",
        },
    )
    assert available_memory(root) == 2 * GIB


def test_version_2_in_a_container_the_mount_is_the_cgroup(tmp_path: Path) -> None:
    root = _machine(
        tmp_path,
        "0::/docker/abc\n",
        **{
            "sys/fs/cgroup/memory.max": f"{GIB}\n",
            "sys/fs/cgroup/memory.current": "0\n",
        },
    )
    assert available_memory(root) == GIB


@pytest.mark.parametrize("limit", [2 * GIB, (1 << 63) - 4096])
def test_version_1(tmp_path: Path, limit: int) -> None:
    folder = "sys/fs/cgroup/memory/app"
    root = _machine(
        tmp_path,
        "4:memory:/app\n3:cpu,cpuacct:/app\n",
        **{
            f"{folder}/memory.limit_in_bytes": f"{limit}\n",
            f"{folder}/memory.usage_in_bytes": f"{GIB}\n",
        },
    )
    assert available_memory(root) == (GIB if limit == 2 * GIB else 16 * GIB)


def test_a_cgroup_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    root = _machine(
        tmp_path,
        "0::/\n",
        **{"sys/fs/cgroup/memory.max": "100\n", "sys/fs/cgroup/memory.current": "200\n"},
    )
    assert available_memory(root) == 0


def test_this_machine() -> None:
    assert 0 < default_capacity() <= available_memory()
