"""Everything that the environment decides, read once into one frozen value.

This is the only file that reads the process's environment. Every variable carries its own help,
from which docs/configuration.md is generated (tools/gen_config_docs.py).
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvcached.errors import ConfigError
from kvcached.hostmemory import default_capacity
from kvcached.units import MIB, Share, parse_share, parse_size

__all__ = [
    "ACCEPTED_NAMES",
    "AcceptedName",
    "Config",
    "Share",
    "Variable",
    "child_environment",
    "default_capacity",
    "default_directory",
    "is_device",
    "variable_of_an_engine",
    "variables",
]

ENABLE = "ENABLE_KVCACHED"
PREFIX = "KVCACHED_"
TRUE_WORDS = frozenset({"1", "true", "yes", "on", "y", "t", "enable", "enabled"})
FALSE_WORDS = frozenset({"0", "false", "no", "off", "n", "f", "disable", "disabled"})
_BOOLEAN = "true, 1, yes, on, or false, 0, no, off"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}")
_DEVICE = re.compile(
    r"host:[A-Za-z0-9][A-Za-z0-9._-]{0,62}|(GPU|MIG)-[0-9A-Fa-f-]+|(cuda:)?\d{1,3}"
)

_BUILD_VARIABLES = frozenset({"KVCACHED_BUILD_JOBS"})  # not for a running engine


@dataclass(frozen=True, slots=True)
class Variable:
    """One variable as its users see it. ``default`` is in words where it is not a constant."""

    name: str
    default: str
    allowed: str
    help: str
    parse: Callable[[str, str], Any] = field(repr=False)


def _fail(name: str, text: str, allowed: str) -> ConfigError:
    return ConfigError(f"{name}={text!r} is not allowed: expected {allowed}")


def _boolean(name: str, text: str) -> bool:
    word = text.lower()
    if word not in TRUE_WORDS | FALSE_WORDS:
        raise _fail(name, text, _BOOLEAN)
    return word in TRUE_WORDS


def _size(name: str, text: str) -> int:
    size_bytes = parse_size(text, name)
    if size_bytes <= 0:
        raise _fail(name, text, "a size above zero, such as 512MiB")
    return size_bytes


def _share(name: str, text: str) -> Share:
    return parse_share(text, name)


def _number(low: float, high: float, allowed: str) -> Callable[[str, str], float]:
    def parse(name: str, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise _fail(name, text, allowed) from None
        if not low <= value <= high:
            raise _fail(name, text, allowed)
        return value

    return parse


def _integer(low: int, allowed: str) -> Callable[[str, str], int]:
    def parse(name: str, text: str) -> int:
        if not re.fullmatch(r"[+-]?\d{1,18}", text) or int(text) < low:
            raise _fail(name, text, allowed)
        return int(text)

    return parse


def _choice(*words: str) -> Callable[[str, str], str]:
    def parse(name: str, text: str) -> str:
        for word in words:
            if text.lower() == word.lower():
                return word
        raise _fail(name, text, " or ".join(words))

    return parse


def _matching(pattern: re.Pattern[str], allowed: str) -> Callable[[str, str], str]:
    def parse(name: str, text: str) -> str:
        if pattern.fullmatch(text) is None:
            raise _fail(name, text, allowed)
        return text

    return parse


def _devices(name: str, text: str) -> tuple[str, ...]:
    devices = tuple(part.strip() for part in text.split(","))
    if not all(_DEVICE.fullmatch(device) for device in devices):
        raise _fail(name, text, _DEVICES_ALLOWED)
    return devices


def _directory(name: str, text: str) -> Path:
    if not text.startswith("/"):
        raise _fail(name, text, "an absolute path")
    return Path(text)


def _page_size(name: str, text: str) -> int:
    return int(_number(1 / 16, 4096, "MiB, from 0.0625 to 4096")(name, text) * MIB)


def _setting(
    name: str, parse: Callable[[str, str], Any], value: Any, default: str, allowed: str, help: str
) -> Any:
    metadata = {"variable": Variable(name, default, allowed, help, parse)}
    if callable(value):
        return field(default_factory=value, metadata=metadata)
    return field(default=value, metadata=metadata)


def default_directory() -> Path:
    """Where the ledgers of this user lie when ``KVCACHED_DIR`` is not set."""
    return Path(f"/dev/shm/kvcached-{os.getuid()}")


DEVICE_ALLOWED = "host:NAME, a GPU's UUID (GPU-...) or its index"
_DEVICES_ALLOWED = (
    f"{DEVICE_ALLOWED}; with tensor parallelism one for all ranks, or one for each rank, "
    "separated by commas"
)
_SIZE_ALLOWED = "a size such as 512MiB or 20GiB"
_SHARE_ALLOWED = "a size such as 2GiB, or a percentage of the capacity such as 25%"
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of one engine. ``notices`` are remarks for the log about what was given."""

    # fmt: off
    enabled: bool = _setting(
        ENABLE, _boolean, False, "false", _BOOLEAN,
        "Switches kvcached on in an engine. Nothing else needs setting.")
    devices: tuple[str, ...] = _setting(
        "KVCACHED_DEVICE", _devices, (),
        "the engine's own device on a GPU, `host:default` without one", _DEVICES_ALLOWED,
        "The device whose memory is shared. Engines that name the same device share a ledger.")
    capacity_bytes: int | None = _setting(
        "KVCACHED_CAPACITY", _size, None,
        "on the host half of the memory available to this cgroup when the first engine creates "
        "the ledger; on a GPU its memory", _SIZE_ALLOWED,
        "Bytes that all engines of the device share, of each device where an engine has several. A "
        "later engine that names another capacity is refused.")
    headroom: Share | None = _setting(
        "KVCACHED_HEADROOM", _share, None, "5% on a GPU, 0 on the host", _SHARE_ALLOWED,
        "Memory that leases leave alone beside what others already use: room for them to grow.")
    directory: Path = _setting(
        "KVCACHED_DIR", _directory, default_directory, "`/dev/shm/kvcached-<uid>`",
        "an absolute path",
        "The directory of the ledgers. Containers that share a device must mount the same one.")
    name: str | None = _setting(
        "KVCACHED_NAME", _matching(_NAME, "up to 63 letters, digits and . _ / -"), None,
        "derived from the served model", "up to 63 letters, digits and `. _ / -`",
        "The instance's name in lists and reports.")
    instance: str | None = _setting(
        "KVCACHED_INSTANCE", _matching(_NAME, "an id made by kvcached"), None,
        "made by the engine's first process", "an id made by kvcached",
        "Internal: tells the processes of one engine that they belong together. Do not set it.")
    guarantee: Share = _setting(
        "KVCACHED_GUARANTEE", _share, Share(), "0", _SHARE_ALLOWED,
        "Memory that is never reclaimed from this engine, on each of its devices.")
    limit: Share | None = _setting(
        "KVCACHED_LIMIT", _share, None, "none: the capacity", _SHARE_ALLOWED,
        "The most that this engine may hold, on each of its devices.")
    weight: float = _setting(
        "KVCACHED_WEIGHT", _number(0.001, 1000, "a number from 0.001 to 1000"), 1.0, "1",
        "a number from 0.001 to 1000",
        "This engine's part of the memory between guarantees and limits, against the others'.")
    preempt: bool = _setting(
        "KVCACHED_PREEMPT", _boolean, False, "off", "on or off",
        "Whether this engine preempts running requests when others wait for memory that it uses "
        "above its fair share. Without it the engine starts no further request until enough of "
        "them have ended.")
    page_bytes: int | None = _setting(
        "KVCACHED_PAGE_SIZE_MB", _page_size, None,
        "chosen so that a page holds 256 to 1024 tokens", "MiB, from 0.0625 to 4096",
        "The size of a page in each rank; rounded up to what the device and the layout need.")
    warm_low: int = _setting(
        "KVCACHED_WARM_LOW", _integer(0, "a whole number of pages, 0 or more"), 1, "1",
        "a whole number of pages, 0 or more", "Pages that are kept mapped ahead of need.")
    warm_high: int = _setting(
        "KVCACHED_WARM_HIGH", _integer(0, "a whole number of pages, 0 or more"), 4, "4",
        "a whole number of pages, not below the low mark",
        "The most pages that a working engine maps ahead of need, beside those of prompts in line; "
        "0 maps none. Pages above this number are given back as soon as they are empty.")
    max_cached_tokens: int = _setting(
        "KVCACHED_MAX_CACHED_TOKENS", _integer(-1, "a number of tokens, or -1"), -1,
        "-1: no bound", "a number of tokens, or -1",
        "The most tokens that free blocks keep for prefix hits.")
    unmapped: str = _setting(
        "KVCACHED_UNMAPPED", _choice("hole", "zero"), "hole", "hole", "hole or zero",
        "What backs addresses without a page: nothing, so that touching them is a fault, or one "
        "shared page of zeros, for kernels that read where they should not (see architecture.md).")
    layout: str = _setting(
        "KVCACHED_LAYOUT", _choice("auto", "block", "layer"), "auto", "auto", "auto, block, layer",
        "Whether a block's layers lie together or each apart; `auto` asks the attention backend, "
        "and divides large blocks on a GPU into up to four groups of layers.")
    map_timeout_s: float = _setting(
        "KVCACHED_MAP_TIMEOUT", _number(0, 3600, "seconds, from 0 to 3600"), 30.0, "30",
        "seconds, from 0 to 3600",
        "How long a step waits for a page that the driver refuses although it is leased.")
    virtual_bytes: int | None = _setting(
        "KVCACHED_VIRTUAL", _size, None, "the device's capacity", _SIZE_ALLOWED,
        "Addresses that each rank of an engine reserves: what it believes its KV cache to be.")
    log_level: str = _setting(
        "KVCACHED_LOG_LEVEL", _choice(*_LEVELS), "INFO", "INFO", ", ".join(_LEVELS),
        "The level of the loggers `kvcached.*`.")
    # fmt: on
    notices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.warm_low > self.warm_high:
            raise ConfigError(
                f"KVCACHED_WARM_LOW={self.warm_low} is above KVCACHED_WARM_HIGH={self.warm_high}: "
                "expected low <= high"
            )

    @classmethod
    def from_env(cls, environment: Mapping[str, str] | None = None) -> Config:
        """Reads all variables, from the process's environment unless another is given.

        Empty values count as not set. Raises ConfigError naming the variable, its value and what
        is allowed. Unknown variables and those without effect become ``notices``.
        """
        given = os.environ if environment is None else environment
        relevant = {
            name: text.strip()
            for name, text in given.items()
            if (name == ENABLE or name.startswith(PREFIX)) and text.strip()
        }
        values: dict[str, Any] = {}
        for attribute, variable in _variables_by_field().items():
            if variable.name in relevant:
                values[attribute] = variable.parse(variable.name, relevant[variable.name])
        notices = _apply_accepted_names(relevant, values)
        notices += _unknown_names(relevant)
        if "warm_low" in values and "warm_high" not in values:
            values["warm_high"] = max(values["warm_low"], cls().warm_high)
        elif "warm_high" in values and "warm_low" not in values:
            values["warm_low"] = min(values["warm_high"], cls().warm_low)
        return cls(**values, notices=tuple(notices))


def variables() -> tuple[Variable, ...]:
    """All variables of Config in their order."""
    return tuple(_variables_by_field().values())


def _variables_by_field() -> dict[str, Variable]:
    return {
        item.name: item.metadata["variable"]
        for item in dataclasses.fields(Config)
        if "variable" in item.metadata
    }


def is_device(name: str) -> bool:
    """Whether this can be a device's name."""
    return _DEVICE.fullmatch(name) is not None


def variable_of_an_engine(name: str) -> str | None:
    """What a variable says that belongs to an engine or to CUDA, such as ``VLLM_PLUGINS``."""
    return os.environ.get(name)


def child_environment(changes: Mapping[str, str], *, whole: bool = False) -> dict[str, str]:
    """This process's environment for a child, without kvcached's variables (unless ``whole``) but
    with changes.
    """
    inherited = {
        name: text
        for name, text in os.environ.items()
        if whole or (name != ENABLE and not name.startswith(PREFIX))
    }
    return {**inherited, **changes}


# -- names that users of the reference implementation have in their scripts -------------------


@dataclass(frozen=True, slots=True)
class AcceptedName:
    """A variable of the reference implementation: what it becomes here, or why nothing."""

    name: str
    parse: Callable[[str, str], Any]
    becomes: str
    field: str | None = None
    convert: Callable[[Any], Any] | None = None


_PAGES = _integer(0, "a whole number of pages, 0 or more")
ACCEPTED_NAMES: tuple[AcceptedName, ...] = (
    AcceptedName(
        "KVCACHED_GPU_UTILIZATION",
        _number(0.01, 1, "a number from 0.01 to 1"),
        "`KVCACHED_HEADROOM`: the rest of the capacity",
        "headroom",
        lambda used: Share(percent=round(100 * (1 - used), 6)),
    ),
    AcceptedName("KVCACHED_MIN_RESERVED_PAGES", _PAGES, "`KVCACHED_WARM_LOW`", "warm_low"),
    AcceptedName("KVCACHED_MAX_RESERVED_PAGES", _PAGES, "`KVCACHED_WARM_HIGH`", "warm_high"),
    AcceptedName(
        "KVCACHED_PAGE_PREALLOC_ENABLED",
        _boolean,
        "`KVCACHED_WARM_LOW=0` where it is false",
        "warm_low",
        lambda enabled: None if enabled else 0,
    ),
    AcceptedName("KVCACHED_IPC_NAME", _matching(_NAME, "a name"), "`KVCACHED_NAME`", "name"),
    AcceptedName(
        "KVCACHED_AUTOPATCH", _boolean, "nothing: `ENABLE_KVCACHED` alone switches kvcached on"
    ),
    AcceptedName(
        "KVCACHED_MAX_CACHED_BLOCKS",
        _integer(-1, "a number of blocks, or -1"),
        "nothing: `KVCACHED_MAX_CACHED_TOKENS` bounds the cache",
    ),
    AcceptedName(
        "KVCACHED_CONTIGUOUS_LAYOUT", _boolean, "nothing: the attention backend decides the layout"
    ),
    AcceptedName(
        "KVCACHED_IPC_TIMEOUT",
        _number(0, 86400, "seconds"),
        "nothing: there are no sockets to wait for",
    ),
    AcceptedName("KVCACHED_SANITY_CHECK", _boolean, "nothing: integrity is checked by the tests"),
    AcceptedName(
        "KVCACHED_LOG_COLOR", _boolean, "nothing: kvcached logs through the engine's handlers"
    ),
)


def _apply_accepted_names(relevant: Mapping[str, str], values: dict[str, Any]) -> list[str]:
    """Fills ``values`` from accepted names; a variable of our own wins. Returns the notices."""
    notices = []
    for accepted in ACCEPTED_NAMES:
        if accepted.name not in relevant:
            continue
        value = accepted.parse(accepted.name, relevant[accepted.name])
        if accepted.field is None:
            notices.append(f"{accepted.name} is accepted and becomes {accepted.becomes}")
            continue
        converted = accepted.convert(value) if accepted.convert else value
        if converted is not None:
            values.setdefault(accepted.field, converted)
    return notices


def _unknown_names(relevant: Mapping[str, str]) -> list[str]:
    known = {variable.name for variable in variables()} | _BUILD_VARIABLES
    known |= {accepted.name for accepted in ACCEPTED_NAMES}
    notices = []
    for name in sorted(relevant.keys() - known):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        notices.append(f"{name} is not a variable of kvcached{hint}")
    return notices
