"""Whatever text comes from outside is taken or refused in words: sizes, settings, names."""

from __future__ import annotations

import math
import string

from hypothesis import given, settings
from hypothesis import strategies as st

from kvcached import vmm_ops
from kvcached.config import Config
from kvcached.errors import ConfigError
from kvcached.units import MAX_SIZE, format_size, parse_share, parse_size

# Pieces that sizes are made of, put together wrongly as well as rightly; and any text at all.
PIECES = st.sampled_from(
    ["0", "1", "512", "1.5", ".", "-", "+", " ", "e9", "K", "MiB", "gib", "GB", "%", "nan", "inf",
     "_", "0x10", "\N{ARABIC-INDIC DIGIT FIVE}", "\N{SUPERSCRIPT TWO}", "9" * 30, "9" * 400,
     "\x00", "\n"]
)  # fmt: skip
TEXT = st.one_of(st.lists(PIECES, max_size=6).map("".join), st.text(max_size=40))
VARIABLES = [
    "ENABLE_KVCACHED", "KVCACHED_DEVICE", "KVCACHED_CAPACITY", "KVCACHED_HEADROOM", "KVCACHED_DIR",
    "KVCACHED_NAME", "KVCACHED_INSTANCE", "KVCACHED_GUARANTEE", "KVCACHED_LIMIT", "KVCACHED_WEIGHT",
    "KVCACHED_PREEMPT", "KVCACHED_PAGE_SIZE_MB", "KVCACHED_WARM_LOW", "KVCACHED_WARM_HIGH",
    "KVCACHED_MAX_CACHED_TOKENS", "KVCACHED_UNMAPPED", "KVCACHED_LAYOUT", "KVCACHED_MAP_TIMEOUT",
    "KVCACHED_VIRTUAL", "KVCACHED_LOG_LEVEL", "KVCACHED_GPU_UTILIZATION",
    "KVCACHED_MIN_RESERVED_PAGES", "KVCACHED_MAX_RESERVED_PAGES", "KVCACHED_IPC_NAME",
    "KVCACHED_PAGE_PREALLOC_ENABLED",
]  # fmt: skip


@settings(max_examples=600, deadline=None)
@given(TEXT)
def test_sizes(text: str) -> None:
    try:
        size = parse_size(text, "limit")
    except ConfigError as error:
        assert "limit" in str(error) and repr(text) in str(error)
    else:
        assert 0 <= size <= MAX_SIZE
        assert format_size(size)


@settings(max_examples=600, deadline=None)
@given(TEXT)
def test_shares(text: str) -> None:
    try:
        share = parse_share(text, "limit")
    except ConfigError as error:
        assert "limit" in str(error)
    else:
        assert 0 <= share.of(1 << 40) <= max(1 << 40, share.size_bytes)
        assert str(share)


@settings(max_examples=1500, deadline=None)
@given(st.dictionaries(st.sampled_from(VARIABLES), TEXT, max_size=4))
def test_settings(environment: dict[str, str]) -> None:
    try:
        config = Config.from_env(environment)
    except ConfigError as error:
        assert any(name in str(error) for name in environment), error
        return
    assert 0 <= config.warm_low <= config.warm_high
    assert math.isfinite(config.weight) and 0.001 <= config.weight <= 1000
    assert math.isfinite(config.map_timeout_s)
    assert config.directory.is_absolute()


@settings(max_examples=600, deadline=None)
@given(st.text(max_size=90), st.text(max_size=90))
def test_names_of_ledgers_stay_in_their_folder(one: str, other: str) -> None:
    names = [vmm_ops.ledger_file_name(device) for device in (one, other)]
    allowed = {*string.ascii_letters, *string.digits, *"-._"}
    for name in names:
        assert name.startswith("ledger-") and {*name} <= allowed
    assert (names[0] == names[1]) == (one == other)
