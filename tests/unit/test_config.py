"""Config: what each variable accepts, how a wrong one is reported, and the generated page."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from kvcached.config import (
    ACCEPTED_NAMES,
    FALSE_WORDS,
    TRUE_WORDS,
    Config,
    Share,
    child_environment,
    default_directory,
    variables,
)
from kvcached.errors import ConfigError
from kvcached.units import GIB, MIB

ROOT = Path(__file__).resolve().parents[2]


def test_defaults() -> None:
    config = Config.from_env({})
    assert config == Config()
    assert not config.enabled
    assert config.capacity_bytes is None and config.devices == () and config.limit is None
    assert config.directory == default_directory()
    assert (config.warm_low, config.warm_high) == (1, 4)
    assert config.max_cached_tokens == -1
    assert config.unmapped == "hole"
    assert config.map_timeout_s == 30
    assert config.notices == ()


def test_is_frozen_and_slotted() -> None:
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.weight = 2.0  # type: ignore[misc]
    assert not hasattr(config, "__dict__")


@pytest.mark.parametrize("word", sorted(TRUE_WORDS | FALSE_WORDS))
def test_every_boolean_word(word: str) -> None:
    for text in (word, word.upper(), f" {word} "):
        assert Config.from_env({"ENABLE_KVCACHED": text}).enabled == (word in TRUE_WORDS)


@pytest.mark.parametrize(
    ("name", "text", "attribute", "value"),
    [
        ("KVCACHED_DEVICE", "host:demo", "devices", ("host:demo",)),
        ("KVCACHED_DEVICE", "0", "devices", ("0",)),
        ("KVCACHED_DEVICE", "GPU-3f2a-99", "devices", ("GPU-3f2a-99",)),
        ("KVCACHED_DEVICE", "host:a, host:b", "devices", ("host:a", "host:b")),
        ("KVCACHED_CAPACITY", "512MiB", "capacity_bytes", 512 * MIB),
        ("KVCACHED_CAPACITY", "20G", "capacity_bytes", 20 * GIB),
        ("KVCACHED_HEADROOM", "5%", "headroom", Share(percent=5)),
        ("KVCACHED_DIR", "/run/kv", "directory", Path("/run/kv")),
        ("KVCACHED_NAME", "Qwen/Qwen3-8B", "name", "Qwen/Qwen3-8B"),
        ("KVCACHED_GUARANTEE", "1GiB", "guarantee", Share(GIB)),
        ("KVCACHED_LIMIT", "50%", "limit", Share(percent=50)),
        ("KVCACHED_WEIGHT", "2.5", "weight", 2.5),
        ("KVCACHED_PREEMPT", "on", "preempt", True),
        ("KVCACHED_PAGE_SIZE_MB", "2", "page_bytes", 2 * MIB),
        ("KVCACHED_WARM_HIGH", "9", "warm_high", 9),
        ("KVCACHED_MAX_CACHED_TOKENS", "16000", "max_cached_tokens", 16000),
        ("KVCACHED_UNMAPPED", "ZERO", "unmapped", "zero"),
        ("KVCACHED_MAP_TIMEOUT", "0.5", "map_timeout_s", 0.5),
        ("KVCACHED_VIRTUAL", "1TiB", "virtual_bytes", 1 << 40),
        ("KVCACHED_LOG_LEVEL", "debug", "log_level", "DEBUG"),
    ],
)
def test_good_values(name: str, text: str, attribute: str, value: object) -> None:
    config = Config.from_env({name: text})
    assert getattr(config, attribute) == value
    assert config.notices == ()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ENABLE_KVCACHED", "maybe"),
        ("KVCACHED_DEVICE", "host:"),
        ("KVCACHED_DEVICE", "host:../etc"),
        ("KVCACHED_DEVICE", "gpu"),
        ("KVCACHED_DEVICE", "host:a,,host:b"),
        ("KVCACHED_DEVICE", "host:a,gpu"),
        ("KVCACHED_CAPACITY", "0"),
        ("KVCACHED_CAPACITY", "lots"),
        ("KVCACHED_CAPACITY", "-1GiB"),
        ("KVCACHED_HEADROOM", "101%"),
        ("KVCACHED_DIR", "relative/path"),
        ("KVCACHED_NAME", "two words"),
        ("KVCACHED_NAME", "x" * 64),
        ("KVCACHED_GUARANTEE", "half"),
        ("KVCACHED_LIMIT", "%"),
        ("KVCACHED_WEIGHT", "0"),
        ("KVCACHED_WEIGHT", "nan"),
        ("KVCACHED_WEIGHT", "inf"),
        ("KVCACHED_PAGE_SIZE_MB", "0"),
        ("KVCACHED_WARM_LOW", "-1"),
        ("KVCACHED_WARM_LOW", "1.5"),
        ("KVCACHED_MAX_CACHED_TOKENS", "-2"),
        ("KVCACHED_UNMAPPED", "one"),
        ("KVCACHED_MAP_TIMEOUT", "soon"),
        ("KVCACHED_VIRTUAL", "0"),
        ("KVCACHED_LOG_LEVEL", "LOUD"),
        ("KVCACHED_GPU_UTILIZATION", "95"),
        ("KVCACHED_MIN_RESERVED_PAGES", "few"),
        ("KVCACHED_AUTOPATCH", "perhaps"),
    ],
)
def test_a_wrong_value_names_variable_value_and_what_is_allowed(name: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_env({name: text})
    message = str(caught.value)
    assert name in message
    assert text.rstrip("%") in message
    assert "expected" in message


def test_watermarks_must_be_in_order() -> None:
    with pytest.raises(ConfigError, match=r"KVCACHED_WARM_LOW=5.*KVCACHED_WARM_HIGH=2"):
        Config.from_env({"KVCACHED_WARM_LOW": "5", "KVCACHED_WARM_HIGH": "2"})


def test_one_watermark_moves_the_other_default() -> None:
    assert Config.from_env({"KVCACHED_WARM_LOW": "6"}).warm_high == 6
    assert Config.from_env({"KVCACHED_WARM_HIGH": "0"}).warm_low == 0


def test_empty_is_unset() -> None:
    names = [variable.name for variable in variables()]
    assert Config.from_env(dict.fromkeys(names, " ")) == Config()


def test_an_unknown_name_is_reported_with_the_nearest() -> None:
    (notice,) = Config.from_env({"KVCACHED_CAPACTY": "1GiB"}).notices
    assert "KVCACHED_CAPACTY" in notice and "KVCACHED_CAPACITY" in notice
    assert Config.from_env({"PATH": "/bin", "KVCACHE_X": "1"}).notices == ()


def test_names_of_the_reference_implementation() -> None:
    config = Config.from_env(
        {
            "KVCACHED_GPU_UTILIZATION": "0.95",
            "KVCACHED_MIN_RESERVED_PAGES": "5",
            "KVCACHED_MAX_RESERVED_PAGES": "10",
            "KVCACHED_PAGE_PREALLOC_ENABLED": "true",
            "KVCACHED_IPC_NAME": "llama",
        }
    )
    assert config.headroom == Share(percent=5)
    assert (config.warm_low, config.warm_high) == (5, 10)
    assert config.name == "llama"
    assert config.notices == ()


def test_no_preallocation_means_no_warm_pages_kept() -> None:
    assert Config.from_env({"KVCACHED_PAGE_PREALLOC_ENABLED": "false"}).warm_low == 0


def test_our_own_name_wins() -> None:
    given = {"KVCACHED_IPC_NAME": "old", "KVCACHED_NAME": "new"}
    assert Config.from_env(given).name == "new"


def test_names_without_equivalent_are_reported() -> None:
    values = {
        "KVCACHED_AUTOPATCH": "1",
        "KVCACHED_MAX_CACHED_BLOCKS": "1000",
        "KVCACHED_CONTIGUOUS_LAYOUT": "true",
        "KVCACHED_IPC_TIMEOUT": "60",
        "KVCACHED_SANITY_CHECK": "false",
        "KVCACHED_LOG_COLOR": "true",
    }
    assert values.keys() == {name.name for name in ACCEPTED_NAMES if name.field is None}
    notices = Config.from_env(values).notices
    assert len(notices) == len(values)
    for name in values:
        assert any(name in notice for notice in notices)


def test_shares() -> None:
    assert Share(3 * MIB).of(GIB) == 3 * MIB
    assert Share(percent=25).of(GIB) == GIB // 4
    assert str(Share(2 * GIB)) == "2 GiB" and str(Share(percent=12.5)) == "12.5%"


def test_a_child_inherits_no_variables_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENABLE_KVCACHED", "1")
    monkeypatch.setenv("KVCACHED_NAME", "parent")
    monkeypatch.setenv("UNRELATED", "kept")
    child = child_environment({"KVCACHED_DIR": "/run/kv"})
    assert "ENABLE_KVCACHED" not in child and "KVCACHED_NAME" not in child
    assert child["UNRELATED"] == "kept" and child["KVCACHED_DIR"] == "/run/kv"


def test_the_page_of_variables_is_current() -> None:
    tool = ROOT / "tools" / "gen_config_docs.py"
    done = subprocess.run([sys.executable, str(tool), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
