"""What an SGLang engine may be, as far as no SGLang is needed to tell."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvcached.config import Config
from kvcached.engines.sglang import build
from kvcached.errors import EngineError

ADAPTER = SimpleNamespace(PLATFORMS=("cpu",))
PLAIN: dict[str, Any] = {
    "tp_size": 1,
    "pp_size": 1,
    "dp_size": 1,
    "nnodes": 1,
    "device": "cpu",
    "page_size": 1,
    "attention_backend": "torch_native",
    "served_model_name": "/models/some model",
    "speculative_algorithm": None,
    "disaggregation_mode": "null",
    "enable_memory_saver": False,
}


def test_a_plain_engine_is_not_refused() -> None:
    build.refuse_unsupported(PLAIN, ADAPTER)
    build.refuse_unsupported({**PLAIN, "enable_lmcache": False, "something": True}, ADAPTER)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device": "cuda:1"}, "cuda engines with this version of SGLang"),
        ({"pp_size": 2}, "pipeline parallelism"),
        ({"dp_size": 2}, "data parallelism"),
        ({"enable_dp_attention": True}, "data parallelism"),
        ({"nnodes": 2}, "several machines"),
        ({"speculative_algorithm": "EAGLE"}, "speculative decoding"),
        ({"disaggregation_mode": "prefill"}, "disaggregated prefill and decode"),
        ({"enable_memory_saver": True}, "the memory saver"),
        ({"enable_hierarchical_cache": True}, "hierarchical caches"),
        ({"enable_lmcache": True}, "hierarchical caches"),
        ({"enable_mixed_chunk": True}, "mixed chunks"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(EngineError, match=rf"does not support {words}.*Unset ENABLE_KVCACHED"):
        build.refuse_unsupported({**PLAIN, **changes}, ADAPTER)


@pytest.mark.parametrize(
    ("kind", "backend", "warns"),
    [
        ("cuda", "fa3", True),
        ("cuda:1", "flashinfer", True),
        ("cuda", "triton", False),
        ("cpu", "torch_native", False),
    ],
)
def test_an_attention_backend_that_was_not_run_is_said(
    kind: str, backend: str, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    build.warn_of_untried({**PLAIN, "device": kind, "attention_backend": backend})
    assert ([backend in record.message for record in caplog.records] == [True]) == warns


def test_a_setting_that_has_gone_is_named() -> None:
    known = {name: value for name, value in PLAIN.items() if name != "disaggregation_mode"}
    with pytest.raises(EngineError, match="no settings disaggregation_mode"):
        build.refuse_unsupported(known, ADAPTER)


def test_an_engine_is_known_only_while_it_is_built(tmp_path: Path) -> None:
    device = f"host:build-{os.getpid()}"
    config = Config.from_env(
        {
            "KVCACHED_DEVICE": device,
            "KVCACHED_DIR": str(tmp_path / "ledger"),
            "KVCACHED_CAPACITY": "64MiB",
        }
    )
    with pytest.raises(EngineError, match="outside of its scheduler"):
        build.current()
    with build.building(config, PLAIN, ADAPTER) as found:
        assert build.current() is found
        assert (found.name, found.device.name) == ("some-model", device)
        assert found.virtual_bytes == found.ledger.capacity == 64 << 20
        found.ledger.close()
    with pytest.raises(EngineError, match="outside of its scheduler"):
        build.current()
