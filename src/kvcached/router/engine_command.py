"""One engine's command line and environment, and what is wrong with them before it is started."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcached import nvml
from kvcached.config import ENABLE, Config
from kvcached.errors import ConfigError, UnavailableError
from kvcached.router.settings import ModelSettings, ServeSettings, Where
from kvcached.units import Share

HOST = "127.0.0.1"
_KEY_OF_VLLM = "VLLM_API_KEY"
# What the service says itself: an engine that listened elsewhere would be lost.
_OURS = frozenset(
    {"host", "port", "uds", "served-model-name", "model", "model-path", "api-key"}
    | {"enable-sleep-mode", "enable-memory-saver"}
)
_VARIABLES = {
    "KVCACHED_NAME": "the model's name is used",
    "KVCACHED_INSTANCE": "kvcached sets it",
}
_VLLM_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_COLOR": "0"}
_DEV_MODE = {"VLLM_SERVER_DEV_MODE": "1"}  # /sleep and /wake_up exist only then


@dataclass(frozen=True, slots=True)
class EngineCommand:
    """What is started, and with which whole environment."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Reach:
    """Where engines listen, and the key that they ask for."""

    host: str = HOST
    """An address of this machine. Without a key only this machine may reach it."""
    key: str = ""

    @property
    def headers(self) -> dict[str, str]:
        """What a request to an engine needs."""
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}


HERE = Reach()


def engine_command(
    settings: ServeSettings,
    model: ModelSettings,
    port: int,
    inherited: Mapping[str, str],
    reach: Reach = HERE,
) -> EngineCommand:
    """How one model's engine is started. ``inherited`` is the service's own environment."""
    environment = engine_environment(settings, model, inherited)
    sleeps = how_it_sleeps(settings, model, on_gpu(environment)).startswith("engine")
    where = ["--host", reach.host, "--port", str(port)]
    python = model.python or Path(sys.executable)
    if model.engine == "vllm":
        command = [str(python.with_name("vllm")), "serve", model.source, *where]
        command += ["--served-model-name", *model.names]
        command += ["--enable-sleep-mode"] if sleeps else []
    else:
        command = [str(python), "-m", "sglang.launch_server", "--model-path", model.source]
        command += [*where, "--served-model-name", model.name]
        command += ["--enable-memory-saver"] if sleeps else []
        command += ["--api-key", reach.key] if reach.key else []
    if sleeps and model.engine == "vllm":
        environment |= _DEV_MODE
    if reach.key and model.engine == "vllm":
        environment[_KEY_OF_VLLM] = reach.key  # not on the command line, which everybody reads
    return EngineCommand((*command, *options(model.arguments)), environment)


def engine_environment(
    settings: ServeSettings, model: ModelSettings, inherited: Mapping[str, str]
) -> dict[str, str]:
    """The whole environment: the service's own, kvcached's settings, then what the file says."""
    ours = {
        "KVCACHED_NAME": model.name,
        "KVCACHED_WEIGHT": f"{model.weight:g}",
        "KVCACHED_GUARANTEE": _exactly(model.guarantee),
        "KVCACHED_LIMIT": _exactly(model.limit),
    }
    engine = _VLLM_ENVIRONMENT if model.engine == "vllm" else {}
    common = service_environment(settings, {**engine, **inherited})
    return {**common, **_given(ours), **_texts(model.environment)}


def service_environment(settings: ServeSettings, inherited: Mapping[str, str]) -> dict[str, str]:
    """What the environments of all engines have in common."""
    memory = settings.memory
    ours = {
        ENABLE: "true",
        "KVCACHED_DEVICE": memory.device,
        "KVCACHED_CAPACITY": None if memory.capacity is None else str(memory.capacity),
        "KVCACHED_HEADROOM": _exactly(memory.headroom),
        "KVCACHED_DIR": None if memory.directory is None else str(memory.directory),
    }
    return {**inherited, **_given(ours), **_texts(settings.environment)}


def options(arguments: list[str | int | float] | dict[str, Any]) -> list[str]:
    """A list as it is, and a mapping as the options that it means: `max-model-len: 4096`,
    `enforce-eager: true` (`--enforce-eager`; false: `--no-enforce-eager`; null: nothing), a list as
    several values, a mapping as JSON.
    """
    if isinstance(arguments, list):
        return [str(word) for word in arguments]
    words: list[str] = []
    for name, value in arguments.items():
        option = "--" + _plain(name)
        if isinstance(value, bool):
            words.append(option if value else "--no-" + _plain(name))
        elif isinstance(value, dict):
            words += [option, json.dumps(value)]
        elif isinstance(value, list):
            words += [option, *map(str, value)]
        elif value is not None:
            words += [option, str(value)]
    return words


def how_it_sleeps(settings: ServeSettings, model: ModelSettings, gpu: bool) -> str:
    """`kv`, `engine-1`, `engine-2` or `stop`; `never` where neither time nor others ask for it."""
    wanted = model.sleep.after_s is not None or settings.max_awake is not None
    if model.sleep.keep_alive or not wanted:
        return "never"
    if model.sleep.how == "auto":
        # SGLang's own sleep needs its memory saver, which an elastic engine cannot have.
        return "engine-1" if gpu and model.engine == "vllm" else "stop"
    return model.sleep.how


def misfits(settings: ServeSettings, inherited: Mapping[str, str]) -> Iterator[tuple[Where, str]]:
    """What this machine says to the settings: the fields that are wrong here, and why."""
    for name in _VARIABLES.keys() & settings.environment.keys():
        yield ("environment", name), _VARIABLES[name]
    if settings.hosts is not None and importlib.util.find_spec("ray") is None:
        yield ("hosts",), "several hosts need Ray: pip install 'kvcached[ray]'"
    for number, model in enumerate(settings.models):
        for place, text in _misfits_of(settings, model, inherited):
            yield ("models", number, *place), text


def _misfits_of(
    settings: ServeSettings, model: ModelSettings, inherited: Mapping[str, str]
) -> Iterator[tuple[Where, str]]:
    python = model.python or Path(sys.executable)
    program = python.with_name("vllm") if model.engine == "vllm" else python
    elsewhere = settings.hosts is not None  # paths and devices are those of other machines
    if not elsewhere and not program.is_file():
        yield (
            ("engine",) if model.python is None else ("python",),
            f"there is no {program}; `python` names the Python that {model.engine} is installed in",
        )
    yield from _wrong_arguments(model)
    for name, why in _VARIABLES.items():
        if name in model.environment:
            yield ("environment", name), why
    environment = engine_environment(settings, model, inherited)
    try:
        config = Config.from_env(environment)
    except ConfigError as error:
        yield _field_of(str(error), model), str(error)
        return
    for notice in config.notices:
        variable = notice.partition(" ")[0]
        if variable in model.environment:
            yield ("environment", variable), notice
    gpu = elsewhere or on_gpu(environment)
    if how_it_sleeps(settings, model, gpu).startswith("engine"):
        if not gpu:
            text = f"{model.sleep.how} needs a GPU; without one expected kv or stop"
            yield ("sleep", "how"), text
        elif model.engine == "sglang" and config.enabled:
            text = (
                f"{model.sleep.how} needs SGLang's memory saver, which kvcached refuses; expected "
                "kv or stop (or ENABLE_KVCACHED: false in the model's environment)"
            )
            yield ("sleep", "how"), text


def _wrong_arguments(model: ModelSettings) -> Iterator[tuple[Where, str]]:
    named = model.arguments
    keys: list[tuple[str | int, str]]
    if isinstance(named, list):
        words = [(n, str(word)) for n, word in enumerate(named)]
        keys = [(n, _plain(word.partition("=")[0])) for n, word in words if word.startswith("--")]
    else:
        keys = [(name, _plain(name)) for name in named]
    for place, name in keys:
        if name in _OURS:
            yield ("arguments", place), f"--{name} is set by the service"
        if isinstance(named, dict) and named[str(place)] is False and model.engine == "sglang":
            yield ("arguments", place), "SGLang has no --no- options: leave it out"


def _field_of(message: str, model: ModelSettings) -> Where:
    """The field that a variable named in an error comes from."""
    variable = message.partition("=")[0]
    if variable in model.environment:
        return ("environment", variable)
    field = variable.removeprefix("KVCACHED_").lower()
    return (field,) if field in ("guarantee", "limit", "weight") else ()


def _given(variables: Mapping[str, str | None]) -> dict[str, str]:
    return {name: text for name, text in variables.items() if text is not None}


def _texts(variables: Mapping[str, str | int | float | bool]) -> dict[str, str]:
    return {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in variables.items()
    }


def _exactly(share: Share | None) -> str | None:
    if share is None:
        return None
    return str(share.size_bytes) if share.percent is None else f"{share.percent:g}%"


def _plain(name: str) -> str:
    return name.lstrip("-").replace("_", "-")


def on_gpu(environment: Mapping[str, str]) -> bool:
    """Whether an engine with this environment would find a GPU."""
    device = environment.get("KVCACHED_DEVICE", "")
    if device:
        return not device.startswith("host:")
    if environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    try:
        return bool(nvml.uuid_of(0))
    except UnavailableError:
        return False
