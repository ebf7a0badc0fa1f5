"""The support matrix: what pytest's reports say becomes the page's rows."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
CASE = """<testcase classname="{file}" name="{name}"><properties>
<property name="runs" value="{kind}"/></properties>{outcome}</testcase>"""


@pytest.fixture
def matrix(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    for name in ("matrix", "setup_env", "setup_sglang"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("matrix")


def report(path: Path, *cases: tuple[str, str, str]) -> Path:
    lines = [
        CASE.format(file="tests.engines.test_x", name=name, kind=kind, outcome=outcome)
        for name, kind, outcome in cases
    ]
    path.write_text(f"<testsuites><testsuite>{''.join(lines)}</testsuite></testsuites>")
    return path


def test_the_last_run_of_each_test_counts(matrix: ModuleType, tmp_path: Path) -> None:
    first = report(
        tmp_path / "vllm-0.24-000.xml",
        ("a", "real engine", "<failure/>"),
        ("b", "real engine", "<skipped/>"),
        ("c", "real classes", "<error/>"),
    )
    second = report(tmp_path / "vllm-0.24-001.xml", ("a", "real engine", ""))
    os.utime(first, (1_700_000_000, 1_700_000_000))
    os.utime(second, (1_700_100_000, 1_700_100_000))
    results = matrix.Results([second, first])
    assert results.cell("real engine") == "1 passed, 1 do not apply"
    assert results.cell("real classes") == "0 passed, **1 failed**"
    line = matrix.row("0.24", results)
    assert line.startswith(
        "| vLLM 0.24.0 | 1 passed, 1 do not apply | 0 passed, **1 failed** | H100"
    )
    assert line.endswith("| 2023-11-16 |")


def test_a_part_of_the_tests_replaces_no_other_parts_report(
    matrix: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix, "RESULTS", tmp_path)
    assert matrix.next_number("0.24") == 0
    for name in ("vllm-0.24-007.xml", "vllm-0.26-020.xml"):
        report(tmp_path / name)
    assert matrix.next_number("0.24") == 8


def test_what_only_skips_was_not_run(matrix: ModuleType, tmp_path: Path) -> None:
    only = report(tmp_path / "one.xml", ("a", "real engine", "<skipped/>"))
    assert matrix.Results([only]).cell("real engine") == "no"


def test_rows_of_other_versions_stay_in_the_order_of_versions(matrix: ModuleType) -> None:
    before = ["| SGLang 0.5.9 | old | e |", "| vLLM 0.24.0 | old | a |", "| vLLM 0.8.4 | old | b |"]
    old = matrix.page("", before)
    after = [
        "| vLLM 0.24.0 | new | c |",
        "| vLLM 0.13.0 | new | d |",
        "| SGLang 0.5.10 | new | f |",
    ]
    new = matrix.page(old, after)
    rows = [line for line in new.splitlines() if line.startswith(("| vLLM", "| SGLang"))]
    assert rows == [
        "| vLLM 0.8.4 | old | b |",
        "| vLLM 0.13.0 | new | d |",
        "| vLLM 0.24.0 | new | c |",
        "| SGLang 0.5.9 | old | e |",
        "| SGLang 0.5.10 | new | f |",
    ]
    assert matrix.HEADER in new


def test_an_engine_around_a_toy_model_is_named_so(matrix: ModuleType, tmp_path: Path) -> None:
    found = report(
        tmp_path / "vllm-0.8.4-000.xml",
        ("a", "real engine", "<skipped/>"),
        ("b", "toy model", ""),
        ("c", "real classes", ""),
    )
    line = matrix.row("0.8.4", matrix.Results([found]))
    assert line.startswith("| vLLM 0.8.4 | toy model: 1 passed | 1 passed | no |")


def test_each_version_has_its_own_reports(
    matrix: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix, "RESULTS", tmp_path)
    for name in ("vllm-0.8.4-000.xml", "sglang-0.4.9-000.xml", "sglang-0.4.6.post2-003.xml"):
        report(tmp_path / name)
    assert [len(matrix.reports_of(version)) for version in ("0.8.4", "sglang-0.4.9")] == [1, 1]
    assert matrix.next_number("sglang-0.4.6.post2") == 4
    assert {"0.32", "sglang-0.5.23"} <= matrix.VERSIONS.keys()
