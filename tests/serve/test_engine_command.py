"""Command lines and environments of engines, and what this machine says to settings."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from kvcached.config import Config
from kvcached.router import engine_command
from kvcached.router.engine_command import how_it_sleeps, misfits, options
from kvcached.router.settings import ServeSettings

HOST = {"memory": {"device": "host:x"}}


def settings(*models: dict[str, Any], **more: Any) -> ServeSettings:
    return ServeSettings.model_validate({**HOST, "models": list(models), **more})


def command(model: dict[str, Any], **more: Any) -> engine_command.EngineCommand:
    made = settings(model, **more)
    return engine_command.engine_command(made, made.models[0], 4711, {"PATH": "/bin"})


def test_vllm() -> None:
    model = {
        "name": "chat",
        "aliases": ["small"],
        "model": "org/chat-7b",
        "python": "/opt/vllm/bin/python",
        "arguments": {"max_model_len": 4096},
    }
    made = command(model)
    assert made.arguments == (
        *("/opt/vllm/bin/vllm", "serve", "org/chat-7b", "--host", "127.0.0.1", "--port", "4711"),
        *("--served-model-name", "chat", "small", "--max-model-len", "4096"),
    )
    assert made.environment["ENABLE_KVCACHED"] == "true"
    assert made.environment["PATH"] == "/bin"
    assert "VLLM_SERVER_DEV_MODE" not in made.environment


def test_sglang() -> None:
    made = command({"name": "chat", "engine": "sglang", "arguments": ["--tp", 2]})
    assert made.arguments == (
        *(sys.executable, "-m", "sglang.launch_server", "--model-path", "chat"),
        *("--host", "127.0.0.1", "--port", "4711", "--served-model-name", "chat", "--tp", "2"),
    )


def test_the_engines_sleep_modes_are_switched_on_where_they_are_used() -> None:
    gpu = {"device": "GPU-11111111-2222-3333-4444-555555555555"}
    sleep = {"sleep": {"after_s": 60, "how": "auto"}}
    made = command({"name": "a", **sleep}, memory=gpu)
    assert "--enable-sleep-mode" in made.arguments
    assert made.environment["VLLM_SERVER_DEV_MODE"] == "1"
    made = command({"name": "a", "engine": "sglang", **sleep}, memory=gpu)
    assert "--enable-memory-saver" not in made.arguments
    sleep = {"sleep": {"after_s": 60, "how": "engine-1"}}
    made = command({"name": "a", "engine": "sglang", **sleep}, memory=gpu)
    assert "--enable-memory-saver" in made.arguments
    for how in ("kv", "stop"):
        made = command({"name": "a", "sleep": {"after_s": 60, "how": how}}, memory=gpu)
        assert "--enable-sleep-mode" not in made.arguments


def test_an_account_gets_the_very_bytes() -> None:
    model = {"name": "a", "guarantee": "1.25GiB", "limit": "33.3%", "weight": 2.5}
    made = command(
        model, memory={"device": "host:x", "capacity": "3GiB", "directory": "/run/ledgers"}
    )
    config = Config.from_env(made.environment)
    assert config.guarantee.size_bytes == 1342177280 and config.limit is not None
    assert config.limit.percent == 33.3 and config.weight == 2.5 and config.name == "a"
    assert config.capacity_bytes == 3 << 30 and str(config.directory) == "/run/ledgers"
    assert config.devices == ("host:x",) and not config.notices


def test_a_models_own_variables_win() -> None:
    model = {"name": "a", "environment": {"A": "model", "ENABLE_KVCACHED": False, "N": 3}}
    made = command(model, environment={"A": "all", "B": "all"})
    found = {name: made.environment[name] for name in ("A", "B", "ENABLE_KVCACHED", "N")}
    assert found == {"A": "model", "B": "all", "ENABLE_KVCACHED": "false", "N": "3"}


def test_options() -> None:
    mapping = {
        "a_b": 1,
        "on": True,
        "off": False,
        "left-out": None,
        "many": ["x=1", 2],
        "json": {"rope": [1]},
    }
    assert options(mapping) == (
        ["--a-b", "1", "--on", "--no-off", "--many", "x=1", "2", "--json", '{"rope": [1]}']
    )
    assert options(["--x", 0.5, "y"]) == ["--x", "0.5", "y"]


@pytest.mark.parametrize(
    ("sleep", "gpu", "expected"),
    [
        ({}, True, "never"),
        ({"after_s": 5}, True, "engine-1"),
        ({"after_s": 5}, False, "stop"),
        ({"after_s": 5, "how": "kv"}, True, "kv"),
        ({"after_s": 5, "how": "engine-1"}, True, "engine-1"),
        ({"after_s": 5, "keep_alive": True}, True, "never"),
    ],
)
def test_how_a_model_sleeps(sleep: dict[str, Any], gpu: bool, expected: str) -> None:
    made = settings({"name": "a", "sleep": sleep})
    assert how_it_sleeps(made, made.models[0], gpu) == expected


@pytest.mark.parametrize("elastic", [True, False])
def test_sglangs_own_sleep_is_for_engines_without_kvcached(elastic: bool) -> None:
    made = settings(
        {
            "name": "a",
            "engine": "sglang",
            "sleep": {"after_s": 9, "how": "engine-1"},
            "environment": {"ENABLE_KVCACHED": elastic},
        },
        memory={"device": "GPU-11111111-2222-3333-4444-555555555555"},
    )
    found = [text for _, text in misfits(made, {})]
    assert ["memory saver" in text for text in found] == [True] * elastic


def test_with_fewer_places_than_models_all_must_be_able_to_sleep() -> None:
    made = settings({"name": "a"}, {"name": "b"}, max_awake=1)
    assert how_it_sleeps(made, made.models[0], gpu=False) == "stop"


@pytest.mark.parametrize(
    ("model", "field", "text"),
    [
        ({"python": "/no/python"}, "python", "there is no /no/vllm"),
        ({"arguments": ["--port=1"]}, "arguments.0", "--port is set by the service"),
        ({"arguments": {"served_model_name": "x"}}, "arguments.served_model_name", "is set by"),
        ({"engine": "sglang", "arguments": {"x": False}}, "arguments.x", "no --no- options"),
        ({"environment": {"KVCACHED_NAME": "x"}}, "environment.KVCACHED_NAME", "name is used"),
        ({"environment": {"KVCACHED_LAYOUT": "x"}}, "environment.KVCACHED_LAYOUT", "not allowed"),
        ({"environment": {"KVCACHED_LAYUOT": "x"}}, "environment.KVCACHED_LAYUOT", "did you mean"),
        ({"sleep": {"after_s": 9, "how": "engine-1"}}, "sleep.how", "needs a GPU"),
    ],
)
def test_misfits(toy_python: Path, model: dict[str, Any], field: str, text: str) -> None:
    made = settings({"name": "a", "python": str(toy_python), **model})
    (found,) = misfits(made, {})
    where, said = found
    assert ".".join(map(str, where)) == f"models.0.{field}" and text in said


def test_what_is_right_is_no_misfit(toy_python: Path) -> None:
    made = settings({"name": "a", "python": str(toy_python), "arguments": ["--max-num-seqs", 4]})
    assert list(misfits(made, {})) == []
