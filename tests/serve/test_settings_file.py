"""The settings file: every error names file, line and field; what is right arrives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from kvcached.router.settings import ServeSettings, json_schema
from kvcached.router.settings_file import SettingsError, SettingsFile, load
from kvcached.units import GIB, MIB, Share

ROOT = Path(__file__).resolve().parents[2]

Load = Callable[..., SettingsFile]


@pytest.fixture
def load_text(tmp_path: Path) -> Load:
    def call(text: str, **environment: str) -> SettingsFile:
        path = tmp_path / "models.yaml"
        path.write_text(text)
        return load(path, environment)

    return call


def errors(load_text: Load, text: str, **environment: str) -> list[str]:
    with pytest.raises(SettingsError) as raised:
        load_text(text, **environment)
    lines = str(raised.value).splitlines()
    return [line.rpartition("/models.yaml:")[2] for line in lines]


def test_the_least_that_works(load_text: Load) -> None:
    settings = load_text("models:\n- name: org/tiny\n").settings
    (model,) = settings.models
    assert model.source == "org/tiny" and model.engine == "vllm" and model.start == "on demand"
    assert settings.listen.port == 8000 and settings.listen.host == "127.0.0.1"
    assert model.sleep.after_s is None and model.guarantee is None


def test_everything_that_can_be_said(load_text: Load) -> None:
    settings = load_text(
        """
listen: "[::1]:9000"
api_keys:
- {key: sk-inline, name: ops}
- {key: "env:TEAM_KEY", models: [small]}
max_body: 8MiB
memory: {device: "host:x", capacity: 4GiB, headroom: 10%}
x-shared: &shared
  arguments: {max-model-len: 4096}
  start: at once
models:
- <<: *shared
  name: chat
  aliases: [small, gpt-4o]
  guarantee: 1GiB
  limit: 50%
  environment: {A: on, B: 010, C: , D: 1.50}
- <<: *shared
  name: code
  start: on demand
""",
        TEAM_KEY="sk-team",
    ).settings
    assert settings.listen.host == "::1" and settings.listen.port == 9000
    assert [key.key.get_secret_value() for key in settings.api_keys] == ["sk-inline", "sk-team"]
    assert settings.max_body == 8 * MIB and settings.memory.capacity == 4 * GIB
    chat, code = settings.models
    assert chat.guarantee == Share(size_bytes=GIB) and chat.limit == Share(percent=50)
    assert chat.environment == {"A": "on", "B": "010", "C": "", "D": "1.50"}
    assert (chat.start, code.start) == ("at once", "on demand")
    assert settings.model_named("gpt-4o") is chat and settings.model_named("no") is None
    assert "sk-" not in repr(settings)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["1: expected settings such as `models:`"]),
        ("- a\n", ["1: expected settings such as `models:`"]),
        ("models: []\n", ["1: models: should have at least 1 item after validation, not 0"]),
        ("a: [\n", ["2: is not YAML: expected the node content, but found '<stream end>'"]),
        ("models:\n- weight: 1\n", ["2: models[0].name: is missing"]),
        (
            "models:\n- name: a\n  limit: 2Gub\n",
            [
                "3: models[0].limit: expected a size such as 2GiB, or a percentage such as 25%, "
                "not '2Gub'"
            ],
        ),
        (
            "models:\n- name: a\n  sleep:\n    after: 3\n",
            ["4: models[0].sleep.after: there is no such field; did you mean after_s?"],
        ),
        (
            "models:\n- name: a\n  sleep: {how: deep}\n",
            [
                "3: models[0].sleep.how: expected 'auto', 'kv', 'engine-1', 'engine-2' or 'stop', "
                "not 'deep'"
            ],
        ),
        (
            "models:\n- name: a\n  weight: 1\n  weight: 2\n",
            ["4: models[0].weight: is there already, on line 3"],
        ),
        ("models:\n- name: a\n- name: a\n", ["3: models[1].name: 'a' already means model a"]),
        (
            "models:\n- name: a\n- name: b\n  aliases: [c, a]\n",
            ["4: models[1].aliases[1]: 'a' already means model a"],
        ),
        (
            "models:\n- name: a\n  guarantee: 3GiB\n  limit: 2GiB\n",
            ["3: models[0].guarantee: 3 GiB is above the model's limit of 2 GiB"],
        ),
        (
            "models:\n- name: a\napi_keys:\n- key: k\n  models: [b]\n",
            ["5: api_keys[0].models[0]: there is no model 'b'; there are: a"],
        ),
        (
            "models:\n- name: a\napi_keys:\n- key: env:NOT_SET\n",
            ["4: api_keys[0].key: the variable NOT_SET is empty or not set"],
        ),
        (
            "models:\n- name: a\n  engine: sglang\n  sleep: {how: engine-2}\n",
            [
                "4: models[0].sleep.how: SGLang's sleep has no level 2; expected engine-1, kv or "
                "stop"
            ],
        ),
        (
            "max_awake: 1\nmodels:\n- {name: a, sleep: {keep_alive: true}}\n- name: b\n",
            ["1: max_awake: a never give up their weights: no place is left for others"],
        ),
        ("listen: nowhere\nmodels: [{name: a}]\n",
         ["1: listen: expected HOST:PORT, such as 127.0.0.1:8000, not 'nowhere'"]),
    ],
)  # fmt: skip
def test_errors(load_text: Load, text: str, expected: list[str]) -> None:
    assert errors(load_text, text) == expected


def test_all_errors_are_told_in_the_order_of_the_file(load_text: Load) -> None:
    text = "drain_s: -1\nmodels:\n- name: a\n  weight: none\n- nam: b\n"
    found = errors(load_text, text)
    assert [line.split(": ")[:2] for line in found] == [
        ["1", "drain_s"],
        ["4", "models[0].weight"],
        ["5", "models[1].name"],
        ["5", "models[1].nam"],
    ]


def test_no_error_shows_a_key(load_text: Load) -> None:
    found = errors(load_text, "models:\n- name: a\napi_keys:\n- key: sk secret\n- key: 12345\n")
    assert found == ["5: api_keys[1].key: expected a valid string"]
    found = errors(load_text, "models:\n- name: a\napi_keys:\n- key: sk secret\n")
    assert len(found) == 1 and "secret" not in found[0]


def test_a_key_in_a_file_beside_it(load_text: Load, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-of-file\n")
    settings = load_text("models: [{name: a}]\napi_keys: [{key: 'file:key'}]\n").settings
    assert settings.api_keys[0].key.get_secret_value() == "sk-of-file"
    found = errors(load_text, "models: [{name: a}]\napi_keys:\n- key: file:no\n")
    assert found[0].startswith("3: api_keys[0].key: the file ")


def test_paths_are_seen_from_the_file(load_text: Load, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    text = "models:\n- {name: a, model: ./weights, python: env/bin/python}\nlogs: {folder: logs}\n"
    settings = load_text(text).settings
    assert settings.models[0].model == str(tmp_path / "weights")
    assert settings.models[0].python == tmp_path / "env/bin/python"
    assert settings.logs.folder == tmp_path / "logs"
    found = errors(load_text, "models:\n- {name: a, model: ./no}\n")
    assert found == [f"2: models[0].model: there is no {tmp_path}/no"]


def test_an_anchor_that_holds_itself_is_an_error(load_text: Load) -> None:
    assert "anchor" in errors(load_text, "models: &a [*a]\n")[0]
    bomb = "x-0: &x0 [1]\n" + "".join(
        f"x-{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]\n" for n in range(1, 10)
    )
    assert "too many values" in errors(load_text, bomb + "models: [{name: a}]\n")[0]


def test_the_published_schema_is_that_of_the_settings() -> None:
    path = ROOT / "docs" / "serve.schema.json"
    assert json.loads(path.read_text()) == json_schema(), (
        "run: kvcached serve --schema > docs/serve.schema.json"
    )


def test_the_schema_takes_what_the_settings_take_and_refuses_what_they_refuse() -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for path in (ROOT / "examples" / "serve").glob("*.yaml"):
        data = yaml.safe_load(path.read_text())
        validator.validate(data)
        ServeSettings.model_validate(data)
    wrong: list[Any] = [
        {},
        {"models": []},
        {"models": [{"name": "a", "limt": 1}]},
        {"models": [{"name": "a", "limit": "2Gub"}]},
        {"models": [{"name": "a", "sleep": {"how": "deep"}}]},
        {"models": [{"name": "a"}], "drain_s": -1},
    ]
    for data in wrong:
        assert not validator.is_valid(data), data
        with pytest.raises(ValueError):
            ServeSettings.model_validate(data)
    for good in ("0.0.0.0:80", {"host": "::", "port": 1}):
        validator.validate({"models": [{"name": "a"}], "listen": good})
