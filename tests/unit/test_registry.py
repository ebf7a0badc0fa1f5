"""Which versions of an engine have an adapter, and that each adapter is there."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import kvcached
from kvcached.engines import registry
from kvcached.errors import UnsupportedEngineError

SOURCE = Path(kvcached.__file__).parents[1]
PARTS = {
    "vllm": {
        "PLATFORMS",
        "expects",
        "new_blocks",
        "scheduling",
        "seams",
        "tensors",
        "used_backends",
    },
    "sglang": {"PLATFORMS", "TOGETHER", "Cache", "arguments", "seams"},
}


@pytest.mark.parametrize(
    ("version", "module"),
    [
        ("0.8.4", "kvcached.engines.vllm.v0_8"),
        ("0.13.0+cpu", "kvcached.engines.vllm.v0_13"),
        ("0.19.1", "kvcached.engines.vllm.v0_19"),
        ("0.24.0", "kvcached.engines.vllm.v0_24"),
        ("0.24.0+cpu", "kvcached.engines.vllm.v0_24"),
        ("0.24.1", "kvcached.engines.vllm.v0_24"),
        ("0.24.1rc1", "kvcached.engines.vllm.v0_24"),
        ("0.32.0", "kvcached.engines.vllm.v0_32"),
        ("0.32.7+cu130", "kvcached.engines.vllm.v0_32"),
    ],
)
def test_a_version_finds_its_adapter(version: str, module: str) -> None:
    assert registry.find("vllm", version) == module


@pytest.mark.parametrize(
    "version",
    [
        "0.8.3",
        "0.8.5",
        "0.14.0",
        "0.19.0",
        "0.23.0",
        "0.25.0",
        "0.31.9",
        "0.33.0",
        "1.24.0",
        "0.24.0.dev1",
    ],
)
def test_other_versions_are_refused_with_what_is_supported(version: str) -> None:
    with pytest.raises(UnsupportedEngineError) as raised:
        registry.find("vllm", version)
    for part in (
        f"vllm {version} is not supported",
        "==0.8.4, ~=0.13.0, ==0.19.1, ~=0.24.0, ~=0.26.0, ~=0.32.0",
        "Unset ENABLE_KVCACHED",
    ):
        assert part in str(raised.value)


def test_engines_do_not_answer_for_each_other() -> None:
    with pytest.raises(UnsupportedEngineError, match=r"sglang 0\.32\.0"):
        registry.find("sglang", "0.32.0")


@pytest.mark.parametrize("support", registry.SUPPORTED, ids=lambda support: support.module)
def test_every_adapter_is_there_and_whole(support: registry.Support) -> None:
    """Read, not imported: only one version of an engine is installed at a time."""
    path = SOURCE / (support.module.replace(".", "/") + ".py")
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    assert names >= PARTS[support.engine]
