"""How much memory this process may use: the machine's, or less where a cgroup limits it."""

from __future__ import annotations

from pathlib import Path

_UNLIMITED_V1 = 1 << 60  # cgroup v1 writes a page-rounded 2**63 where there is no limit


def default_capacity(root: Path = Path("/")) -> int:
    """Half of the memory available to this cgroup now, in bytes.

    ``root`` is where proc and sys are found; tests give another one.
    """
    return available_memory(root) // 2


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that can still be had: MemAvailable, or what the tightest cgroup limit leaves."""
    rooms = [_mem_available(root), *_cgroup_v2_rooms(root), *_cgroup_v1_rooms(root)]
    return max(0, min(rooms))


def _mem_available(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{root / 'proc/meminfo'} has no MemAvailable line")


def _cgroup_v2_rooms(root: Path) -> list[int]:
    """For this cgroup and its parents: the limit less what is used and cannot be dropped."""
    rooms = []
    for folder in _cgroup_folders(root, "", root / "sys/fs/cgroup"):
        limit, used = _read(folder / "memory.max"), _read(folder / "memory.current")
        if limit is not None and used is not None:
            rooms.append(limit - used + _droppable(folder, "inactive_file"))
    return rooms


def _cgroup_v1_rooms(root: Path) -> list[int]:
    rooms = []
    for folder in _cgroup_folders(root, "memory", root / "sys/fs/cgroup/memory"):
        limit = _read(folder / "memory.limit_in_bytes")
        used = _read(folder / "memory.usage_in_bytes")
        if limit is not None and used is not None and limit < _UNLIMITED_V1:
            rooms.append(limit - used + _droppable(folder, "total_inactive_file"))
    return rooms


def _cgroup_folders(root: Path, controller: str, mount: Path) -> list[Path]:
    """The folders from this process's cgroup up to the mount point.

    Inside a container the path of /proc/self/cgroup may not exist below the mount; then the mount
    itself is the container's cgroup.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            folder = mount / path.lstrip("/")
            return [f for f in (folder, *folder.parents) if f == mount or mount in f.parents]
    return []


def _droppable(folder: Path, key: str) -> int:
    """Page cache that the kernel drops before anything is refused."""
    try:
        for line in (folder / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
    except OSError:
        pass
    return 0


def _read(path: Path) -> int | None:
    """The number in a cgroup file; None where it is absent or says max."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
