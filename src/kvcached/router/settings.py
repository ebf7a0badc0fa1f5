"""What `kvcached serve` is told: one frozen value, however it was written down.

Every field carries its own help: docs/serve.schema.json is made from it. Durations are seconds and
say so in their names; sizes are bytes, written as `units` takes them. Nothing here reads a file or
the environment: `settings_file` does, and knows the lines that errors name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator
from pydantic_core import PydanticCustomError

from kvcached.router.amounts import ShareField, SizeField
from kvcached.units import MIB

Seconds = Annotated[float, Field(ge=0, le=30 * 86400)]


_HOST_AND_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\s]+):(\d{1,5})")
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}$"  # as KVCACHED_NAME allows it: it becomes that
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ListenSettings(_Settings):
    """The address that clients use."""

    host: str = Field(default="127.0.0.1", min_length=1)
    """A name or an address; 0.0.0.0 for all of the machine's."""
    port: int = Field(default=8000, ge=0, le=65535)
    """0: any free port, which is said at start."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        match = _HOST_AND_PORT.fullmatch(value)
        if match is None:
            raise PydanticCustomError("listen", "expected HOST:PORT, such as 127.0.0.1:8000")
        return {"host": match[1].strip("[]"), "port": int(match[2])}


class KeySettings(_Settings):
    """An API key and what it opens."""

    key: SecretStr = Field(min_length=1)
    """The key itself, or where it stands: `file:PATH` or `env:VARIABLE`."""
    name: str = ""
    """What logs and metrics call its holder; never the key."""
    models: list[str] | None = None
    """Names or aliases of the models that it may use; all of them if this is left out."""


class SleepSettings(_Settings):
    """What a model gives up while nobody uses it. A request in its hands is use, however long."""

    kv_after_s: Seconds | None = 2.0
    """Seconds without a request after which its KV cache's memory goes back to the others. Null:
    only when others want it."""
    after_s: Seconds | None = Field(default=None, ge=1)
    """Seconds without a request after which it falls asleep. Null: never."""
    how: Literal["auto", "kv", "engine-1", "engine-2", "stop"] = "auto"
    """`kv`: it keeps its weights. `engine-1`: the engine's sleep mode, weights go to the host's
    memory (SGLang: release of memory). `engine-2`: vLLM's level 2, weights are read anew. `stop`:
    its processes end. `auto`: `engine-1` for vLLM on a GPU, else `stop`."""
    keep_alive: bool = False
    """Pins it: it stays awake and keeps its cached prefixes until others want their memory."""


class QueueSettings(_Settings):
    """The line of requests that wait for one model."""

    max_waiting: int = Field(default=256, ge=0)
    """Requests that may wait; more are refused with 429."""
    max_running: int | None = Field(default=None, ge=1)
    """Requests that are with the engine at once. Null: the engine's own queue takes all."""
    timeout_s: Seconds = 600.0
    """How long a request may wait, a start or wake of its model included."""


class SloSettings(_Settings):
    """When the first token of an answer is due: what scheduling across models aims at."""

    ttft_ms: float = Field(default=2000.0, gt=0)
    """Milliseconds until the first token of a short prompt."""
    ttft_ms_per_1k_prompt_tokens: float = Field(default=500.0, ge=0)
    """What each thousand tokens of a prompt add to that."""
    tpot_ms: float = Field(default=100.0, gt=0)
    """Milliseconds that each further token may take: what placing on several hosts counts with."""


class LoadSettings(_Settings):
    """What a model asks of a host, for placing on several hosts. What is measured replaces it."""

    tokens_per_s: float = Field(default=0.0, ge=0)
    """Tokens of prompts and answers that are expected, of all replicas together."""
    token_bytes: SizeField | None = None
    """KV cache of one token. Null: as its engine says once it has run."""
    weights: SizeField | None = None
    """Memory for its weights. Null: the size of its files, where its folder is on this machine."""


class HostsSettings(_Settings):
    """Several hosts, as nodes of a Ray cluster."""

    ray: str = "auto"
    """`auto`: the cluster that this machine belongs to. HOST:PORT: the cluster with this head.
    `local`: one is started, of this machine alone."""
    nodes: list[str] | None = Field(default=None, min_length=1)
    """Names or addresses of the nodes that may serve. Null: all that there are."""
    lost_after_s: float = Field(default=10.0, ge=1, le=3600)
    """A node that says nothing for so long is taken as lost: its models start on others, and it
    ends its engines."""

    @field_validator("ray")
    @classmethod
    def _address(cls, value: str) -> str:
        if value not in ("auto", "local") and not _HOST_AND_PORT.fullmatch(value):
            raise PydanticCustomError("cluster", "expected auto, local or HOST:PORT")
        return value


class RestartSettings(_Settings):
    """What follows when an engine ends that should run."""

    first_s: Seconds = 1.0
    """The wait before the first restart; each further one is twice as long."""
    longest_s: Seconds = 60.0
    """The longest wait."""
    give_up_after: int = Field(default=5, ge=1)
    """Starts that fail one after the other until the model is given up."""
    forgotten_after_s: Seconds = 300.0
    """An engine that has run so long starts counting anew."""


class HealthSettings(_Settings):
    """How it is noticed that an engine lives but does not answer."""

    every_s: Seconds = Field(default=5.0, gt=0)
    """The time between two looks."""
    timeout_s: Seconds = Field(default=25.0, gt=0)
    """How long an answer may take. SGLang's own check may take 20 s on a busy engine."""
    failures: int = Field(default=2, ge=1)
    """Looks without a good answer, one after the other, until the engine is killed."""
    stalled_after_s: Seconds | None = 300.0
    """A vLLM engine that says it runs requests and makes no token for so long is killed. Null:
    never. SGLang does not say how far a request is."""


class LogSettings(_Settings):
    """Where what the engines print goes, beside the service's own output."""

    folder: Path | None = None
    """A folder for one rotating file a model. Null: no files."""
    max_size: SizeField = Field(default=16 * MIB, ge=4096)
    """How large a file may grow until it is rotated."""
    files: int = Field(default=3, ge=1, le=1000)
    """How many older files are kept."""


class MemorySettings(_Settings):
    """The memory that the models share; what is left out is found as an engine alone finds it."""

    device: str | None = None
    """`host:NAME`, a GPU's UUID or its index."""
    capacity: SizeField | None = Field(default=None, gt=0)
    """What all models may hold together for their KV caches."""
    headroom: ShareField | None = None
    """What is left alone, for others to grow."""
    directory: Path | None = None
    """The ledgers' directory."""


class ModelSettings(_Settings):
    """One model and the engine that serves it."""

    name: str = Field(pattern=_NAME)
    """What clients call it, and `kvctl` too."""
    aliases: list[Annotated[str, Field(min_length=1, max_length=255)]] = []
    """Further names that clients may use."""
    engine: Literal["vllm", "sglang"] = "vllm"
    model: str = ""
    """A folder, or a name on the model hub; the model's own name if this is left out."""
    python: Path | None = None
    """The Python of the environment in which the engine is installed; the service's own if left
    out. So vLLM and SGLang may live in different environments."""
    arguments: list[str | int | float] | dict[str, Any] = []
    """The engine's options: a list as on its command line, or a mapping from names to values."""
    replicas: int = Field(default=1, ge=1)
    """Engines that serve it, each on another host. More than one needs `hosts`."""
    load: LoadSettings = LoadSettings()
    environment: dict[str, str | int | float | bool] = {}
    """Variables for this engine beside the service's own."""
    start: Literal["at once", "on demand"] = "on demand"
    """Whether it starts with the service or with its first request."""
    guarantee: ShareField | None = None
    """Memory that is never taken from it."""
    limit: ShareField | None = None
    """The most that it may hold."""
    weight: float = Field(default=1.0, ge=0.001, le=1000)
    """Its part of the memory between guarantees and limits, against the others'."""
    sleep: SleepSettings = SleepSettings()
    queue: QueueSettings = QueueSettings()
    slo: SloSettings = SloSettings()
    restart: RestartSettings = RestartSettings()
    health: HealthSettings = HealthSettings()
    start_timeout_s: Seconds = Field(default=900.0, gt=0)
    """How long a start may take until it counts as failed: the first one may fetch weights."""
    stop_timeout_s: Seconds = 20.0
    """How long the engine has to end when asked to; then it is killed."""

    @field_validator("arguments", mode="before")
    @classmethod
    def _options(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return value
        if not isinstance(value, list) or not all(_is_word(item) for item in value):
            raise PydanticCustomError(
                "arguments", "expected a list of words and numbers, or a mapping from names"
            )
        return value

    @field_validator("environment")
    @classmethod
    def _variables(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if not _VARIABLE.fullmatch(name):
                raise PydanticCustomError("variable", f"{name!r} cannot be a variable's name")
        return value

    @property
    def source(self) -> str:
        """What the engine is told to load."""
        return self.model or self.name

    @property
    def names(self) -> tuple[str, ...]:
        """All names that clients may use."""
        return (self.name, *self.aliases)


class ServeSettings(_Settings):
    """Everything that `kvcached serve` is told."""

    listen: ListenSettings = ListenSettings()
    """HOST:PORT, or a mapping with both."""
    api_keys: list[KeySettings] = []
    """Who may use the service; anybody who reaches its address if there are none."""
    max_body: SizeField = Field(default=64 * MIB, ge=1024)
    """The largest request."""
    cors_origins: list[str] = []
    """Web pages whose scripts may use the service: their origins, or `*`."""
    drain_s: Seconds = 30.0
    """How long requests may go on after SIGTERM."""
    scheduling: Literal["deadlines", "fifo"] = "deadlines"
    """Which request goes first where memory is short. `deadlines`: as many first tokens as possible
    are on time (the models' `slo`). `fifo`: the oldest one."""
    parallel_starts: int = Field(default=2, ge=1)
    """Engines that start or wake at once; others wait their turn."""
    max_awake: int | None = Field(default=None, ge=1)
    """Engines that hold their weights at once, where the device has no room for all. Who wants to
    wake beyond that puts the one to sleep that has been idle longest. Null: all."""
    turn_s: Seconds = 30.0
    """How long a busy model stays awake before others may have its place under `max_awake`: it
    then takes no further requests, which wait, and finishes those that it has."""
    hosts: HostsSettings | None = None
    """Where one machine is not enough. Null: this machine, without Ray."""
    memory: MemorySettings = MemorySettings()
    logs: LogSettings = LogSettings()
    environment: dict[str, str | int | float | bool] = {}
    """Variables for all engines."""
    models: list[ModelSettings] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _without_writers_keys(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: each for key, each in value.items() if not str(key).startswith("x-")}

    @model_validator(mode="after")
    def _fit_together(self) -> ServeSettings:
        problems = [(list(where), text) for where, text in _misfits(self)]
        if problems:
            text = "; ".join(text for _, text in problems)
            raise PydanticCustomError("misfit", "{text}", {"text": text, "problems": problems})
        return self

    def model_named(self, name: str) -> ModelSettings | None:
        """The model that clients call so, by name or alias."""
        return next((model for model in self.models if name in model.names), None)


def _is_word(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


Where = tuple[str | int, ...]


def _misfits(settings: ServeSettings) -> Iterator[tuple[Where, str]]:
    """Fields that are right alone and wrong together: where, and what is wrong."""
    owners: dict[str, str] = {}
    for number, model in enumerate(settings.models):
        for place, name in _named(model):
            if name in owners:
                yield ("models", number, *place), f"{name!r} already means model {owners[name]}"
            owners.setdefault(name, model.name)
        yield from ((("models", number, *place), text) for place, text in _misfits_of(model))
        if model.replicas > 1 and settings.hosts is None:
            yield ("models", number, "replicas"), "more than one needs several hosts: `hosts`"
    yield from _misfits_of_seats(settings)
    for number, key in enumerate(settings.api_keys):
        for position, name in enumerate(key.models or ()):
            if name not in owners:
                known = ", ".join(owners)
                where = ("api_keys", number, "models", position)
                yield where, f"there is no model {name!r}; there are: {known}"


def _misfits_of_seats(settings: ServeSettings) -> Iterator[tuple[Where, str]]:
    seats, models = settings.max_awake, settings.models
    fixed = [each.name for each in models if each.sleep.keep_alive or each.sleep.how == "kv"]
    if seats is not None and seats < len(models) and seats <= len(fixed):
        names = ", ".join(fixed)
        yield ("max_awake",), f"{names} never give up their weights: no place is left for others"


def _named(model: ModelSettings) -> Iterator[tuple[Where, str]]:
    yield ("name",), model.name
    for position, alias in enumerate(model.aliases):
        yield ("aliases", position), alias


def _misfits_of(model: ModelSettings) -> Iterator[tuple[Where, str]]:
    guarantee, limit = model.guarantee, model.limit
    if guarantee and limit and (guarantee.percent is None) == (limit.percent is None):
        sure = guarantee.size_bytes if guarantee.percent is None else guarantee.percent
        most = limit.size_bytes if limit.percent is None else limit.percent
        if sure > most:
            yield ("guarantee",), f"{guarantee} is above the model's limit of {limit}"
    if model.engine == "sglang" and model.sleep.how == "engine-2":
        yield ("sleep", "how"), "SGLang's sleep has no level 2; expected engine-1, kv or stop"
    if model.restart.first_s > model.restart.longest_s:
        yield ("restart", "first_s"), "is longer than longest_s"


def json_schema() -> dict[str, Any]:
    """The JSON schema of the file (2020-12), for editors: docs/serve.schema.json."""
    schema = ServeSettings.model_json_schema(mode="validation")
    listen = schema["$defs"]["ListenSettings"]
    text = {"type": "string", "pattern": f"^{_HOST_AND_PORT.pattern}$"}
    schema["$defs"]["ListenSettings"] = {"anyOf": [text, listen]}
    schema["patternProperties"] = {"^x-": {"description": "Left to the writer, for anchors."}}
    schema["title"] = "The settings of kvcached serve"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
