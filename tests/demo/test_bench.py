"""The benchmarks' figures and how they are shown; no engine is started."""

from __future__ import annotations

import io

from rich.console import Console

from kvcached.bench.engine import Round, summary
from kvcached.cli.bench import _alloc_tables, _engine_table
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
