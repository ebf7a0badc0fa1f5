"""The benchmarks' figures and how they are shown; no engine is started."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from kvcached.bench.engine import Round, summary
from kvcached.bench.vmm import run as run_vmm
from kvcached.cli.bench import _alloc_tables, _engine_table, _vmm_table
from kvcached.errors import ConfigError
from kvcached.units import MIB


def test_the_medians_are_of_the_pairs() -> None:
    pairs = [
        {"elastic": Round(speed, 2.0), "plain": Round(100.0, 1.0)} for speed in (97.0, 99.0, 110.0)
    ]
    report = summary(pairs, 24, 64 * MIB)
    assert report["overhead_vs_plain"] == 0.99 and report["cpu_vs_plain"] == 2.0
    assert [pair["ratio"] for pair in report["overhead_pairs"]] == [0.97, 0.99, 1.1]
    text = io.StringIO()
    Console(file=text, width=120).print(_engine_table(report))
    assert "0.990" in text.getvalue() and "64 MiB" in text.getvalue()


def test_pools_are_shown_only_where_they_were_measured() -> None:
    core = {"alloc1_warm_us": 0.2, "free1_warm_us": 0.1}
    result = {"num_blocks": 65536, "rounds": 5, **core, "by_num_blocks": {1024: core}}
    assert len(_alloc_tables(result)) == 1
    pools = {"pool_alloc1_us": 1.1, "vllm_pool_alloc1_us": 1.0}
    text = io.StringIO()
    for table in _alloc_tables({**result, **pools}):
        Console(file=text, width=120).print(table)
    assert "1.10" in text.getvalue()


def test_a_page_is_timed_beside_the_bare_calls() -> None:
    result = run_vmm("host", 64 << 10, 40)
    for way in ("in", "out"):
        for handle in ("kept", "new"):
            ours, bare = (result[f"{who}_{way}_{handle}_us"] for who in ("page", "bare"))
            assert ours > 0 and bare > 0
            ratio = result[f"page_{way}_{handle}_ratio"]
            assert abs(ratio - ours / bare) < 0.02 * ratio
    assert 0 < result["arena_open_64gib_ms"] < 10_000
    assert result["arena_open_host_mib"] < 64, "addresses cost no memory"
    text = io.StringIO()
    Console(file=text, width=120).print(_vmm_table(result))
    assert "64 KiB on host" in text.getvalue() and "out, new handle" in text.getvalue()


@pytest.mark.parametrize("name", ["", "cuda", "cuda:x", "hosts"])
def test_a_backend_that_does_not_exist_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match="expected host or cuda:N"):
        run_vmm(name, 1, 1)
