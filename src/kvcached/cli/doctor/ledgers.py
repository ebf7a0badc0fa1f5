"""The ledgers' folder, each ledger in it, leftovers, and whether one ledger governs each device."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvcached import devices, nvml, strangers
from kvcached.cli.doctor.finding import Finding, error, note, ok, warning
from kvcached.cli.edge import one_line
from kvcached.config import Config
from kvcached.errors import KvcachedError, LedgerError, UnavailableError
from kvcached.ledger import Ledger
from kvcached.snapshot import LedgerSnapshot
from kvcached.strangers import MappedLedger
from kvcached.units import format_size
from kvcached.vmm_ops import ledger_file_name

MOUNT = "mount one folder into all containers and set KVCACHED_DIR to it (docs/operating.md)"


def folder(config: Config) -> Iterator[Finding]:
    """The folder and who may write to it."""
    path = config.directory
    try:
        found = path.lstat()
    except FileNotFoundError:
        parent = next(p for p in path.parents if p.exists())
        if os.access(parent, os.W_OK | os.X_OK):
            yield note("folder", f"{path} does not exist yet: the first engine makes it")
        else:
            text = f"{path} does not exist, and this user may not write to {parent}"
            yield error("folder", text, "make it for the user of the engines, or set KVCACHED_DIR")
        return
    except OSError as failed:
        yield error("folder", f"{path}: {failed.strerror}", "set KVCACHED_DIR to a folder")
        return
    if not path.is_dir() or path.is_symlink():
        yield error("folder", f"{path} is not a folder", "remove it, or set KVCACHED_DIR")
    elif not os.access(path, os.R_OK | os.X_OK):
        text = (
            f"{path} belongs to user {found.st_uid}, and user {os.geteuid()} may not look into it"
        )
        yield error("folder", text, f"chmod g+rx {path}, for tools of its group that only read")
    elif found.st_uid != os.geteuid():
        text = f"{path} belongs to user {found.st_uid}, this is user {os.geteuid()}: reading only"
        yield warning("folder", text, "run tools that change something as the engines' user")
    elif found.st_mode & 0o022:
        text = f"{path}: other users may write to it, so engines refuse it"
        yield error("folder", text, f"chmod go-w {path}")
    else:
        yield ok("folder", f"{path} (mode {found.st_mode & 0o777:o})")


def ledgers(config: Config) -> Iterator[Finding]:
    """Every ledger of the folder, and whether other ledgers govern the same devices."""
    gpus = _gpus()
    try:
        names = devices.shared(config.directory)
    except LedgerError:  # ``folder`` says so
        names = []
    opened: dict[str, Ledger] = {}
    try:
        for device in names:
            try:
                opened[device] = Ledger.open(config.directory, device, create=False, read_only=True)
                yield from _ledger(config, opened[device].snapshot(), gpus)
            except LedgerError as failed:
                do = f"stop its engines, then: kvctl delete --ledger --device {device}"
                yield error("ledger", str(failed), do)
        # The ledgers that are open here are in this process's own list of mappings too.
        mapped, refused = strangers.mapped_ledgers()
        governed = {ledger_file_name(name) for name in (*names, *gpus)}
        yield from _others(mapped, refused, governed, config.directory)
        for uuid in gpus:
            ledger = opened.get(uuid)
            of_this = [each for each in mapped if each.file_name == ledger_file_name(uuid)]
            yield from _strangers(uuid, None if ledger is None else ledger.snapshot(), of_this)
    finally:
        for ledger in opened.values():
            ledger.close()


def _gpus() -> list[str]:
    try:
        return nvml.uuids()
    except UnavailableError:
        return []


def _ledger(config: Config, now: LedgerSnapshot, gpus: list[str]) -> Iterator[Finding]:
    alive = [account for account in now.accounts if account.alive]
    dead = [one_line(account.name) for account in now.accounts if not account.alive]
    held = f"{format_size(now.charge)} of {format_size(now.capacity)} held"
    yield ok("ledger", f"{now.device}: {len(alive)} instances, {held}")
    if dead:
        text = f"{now.device}: accounts of dead instances: {', '.join(dead)}"
        yield warning("leftovers", text, f"kvctl delete --device {now.device}")
    if not now.device.startswith("host:") and now.device not in gpus:
        text = f"{now.device}: no such GPU is visible here"
        do = f"pass the GPU in, or: kvctl delete --ledger --device {now.device}"
        yield warning("ledger", text, do)
    if config.capacity_bytes not in (None, now.capacity) and now.device in config.devices:
        text = (
            f"{now.device}: KVCACHED_CAPACITY is {format_size(config.capacity_bytes or 0)}, the "
            f"ledger's capacity {format_size(now.capacity)}: an engine would be refused"
        )
        yield error("capacity", text, "set the ledger's, or delete the ledger while nobody uses it")
    for account in now.accounts:
        if account.lock_timeouts:
            text = f"{now.device}: {one_line(account.name)} did not get the ledger's lock in time"
            times = f"{account.lock_timeouts} times"
            yield note("lock", f"{text}, {times}", "look for stopped processes (state T in ps)")


def _others(
    found: Sequence[MappedLedger], refused: int, file_names: set[str], own: Path
) -> Iterator[Finding]:
    """Of the devices that have these ledgers; what programs do in other folders is their affair."""
    by_name = defaultdict(list)
    for each in found:
        if each.file_name in file_names:
            by_name[each.file_name].append(each)
        if each.deleted and Path(each.path).parent == own:
            text = f"{each.path} was deleted while processes {_pids(each.pids)} use it"
            yield error(
                "two ledgers", text, "restart those engines: nobody else sees what they hold"
            )
    for name, several in by_name.items():
        if len(several) < 2:
            continue
        parts = [f"{each.path} (processes {_pids(each.pids)})" for each in several]
        text = f"{len(several)} ledgers govern one device, each lends all of it: {'; '.join(parts)}"
        if name.startswith("ledger-host-"):
            yield warning("two ledgers", text, f"if this is not meant: {MOUNT}")
        else:
            yield error("two ledgers", text, MOUNT)
    if refused and os.geteuid() != 0:
        text = f"{refused} processes of other users could not be asked which ledger they use"
        yield note("two ledgers", text, "run the doctor as root to look at all of them")


def _strangers(
    uuid: str, ledger: LedgerSnapshot | None, mapped: Sequence[MappedLedger]
) -> Iterator[Finding]:
    try:
        processes = nvml.Gpu(uuid).processes()
    except KvcachedError as failed:
        yield note("strangers", f"{uuid}: its processes cannot be listed: {failed}")
        return
    unknown = strangers.strangers(processes, ledger, mapped)
    here = {pid: used for pid, used in unknown.items() if strangers.is_here(pid)}
    elsewhere = [used for pid, used in unknown.items() if pid not in here]
    if not unknown:
        yield ok("strangers", f"{uuid}: all {len(processes)} processes on it are in its ledger")
    if here:
        parts = [f"{pid}{_command(pid)} {format_size(used)}" for pid, used in here.items()]
        text = f"{uuid}: processes that use it and are in no ledger here: {', '.join(parts)}"
        do = f"programs that are no engines of kvcached may do so; if one is: {MOUNT}"
        yield note("strangers", text, do)
    if elsewhere:
        held = format_size(sum(elsewhere))
        text = (
            f"{uuid}: {len(elsewhere)} processes with {held} are not of this PID namespace: "
            "whether they are in the ledger cannot be told from here"
        )
        yield note("strangers", text, "run the doctor on the host, as root or as the engines' user")


def _command(pid: int) -> str:
    try:
        return f" ({one_line(Path(f'/proc/{pid}/comm').read_text().strip())})"
    except OSError:
        return ""


def _pids(pids: tuple[int, ...]) -> str:
    return ", ".join(str(pid) for pid in pids if pid != os.getpid()) or "none but this one"
