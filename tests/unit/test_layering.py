"""The nevers of the house, kept by reading the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "kvcached"
SOURCES = sorted(PACKAGE.rglob("*.py"))
CPP = sorted((ROOT / "csrc").rglob("*.[ch]pp"))
MAX_LINES = 400

ENGINES = {"vllm", "sglang"}
REGISTRY = "kvcached.engines.registry"
ROOMS = ("engines", "cli", "router", "hosts", "demo", "bench")  # everything else is the core

# Functions at a process's edge, where an exception of any kind must become a report.
BROAD_EXCEPT_ALLOWED: set[str] = set()


def _room(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first if first in ROOMS else "core"


def _imports(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, wherever it stands (type-checking apart)."""
    for node in ast.walk(_without_type_checking(ast.parse(path.read_text()))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _without_type_checking(tree: ast.Module) -> ast.Module:
    tree.body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    ]
    return tree


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _top(module: str) -> str:
    return module.partition(".")[0]


def _inside(module: str, *packages: str) -> bool:
    return any(module == p or module.startswith(p + ".") for p in packages)


@pytest.mark.parametrize("path", [p for p in SOURCES if _room(p) == "core"], ids=_name)
def test_the_core_imports_no_engine_and_no_tool(path: Path) -> None:
    for module in _imports(path):
        assert _top(module) not in ENGINES, module
        assert not _inside(module, *(f"kvcached.{room}" for room in ROOMS)), module


@pytest.mark.parametrize("path", [p for p in SOURCES if _room(p) == "engines"], ids=_name)
def test_engines_know_neither_tools_nor_each_other(path: Path) -> None:
    parts = path.relative_to(PACKAGE / "engines").parts
    own = parts[0] if len(parts) > 1 else ""
    for module in _imports(path):
        assert not _inside(module, "kvcached.cli", "kvcached.router", "kvcached.demo"), module
        if _top(module) in ENGINES:
            assert _top(module) == own, module
        if own and _inside(module, *(f"kvcached.engines.{e}" for e in ENGINES)):
            assert _inside(module, f"kvcached.engines.{own}"), module


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if _room(p) in ("cli", "router", "hosts")], ids=_name
)
def test_tools_import_no_torch_and_no_engine(path: Path) -> None:
    for module in _imports(path):
        assert _top(module) not in ENGINES | {"torch"}, module
        # Which versions are supported is data, and its file imports no engine: the doctor reads it.
        if path.parent.name == "doctor" and _inside(module, REGISTRY):
            continue
        assert not _inside(module, "kvcached.engines", "kvcached.views"), module


def test_the_registry_of_versions_imports_no_engine() -> None:
    for module in _imports(PACKAGE / "engines" / "registry.py"):
        assert not _inside(module, "kvcached.engines") and _top(module) not in ENGINES, module


@pytest.mark.parametrize("path", [p for p in SOURCES if _room(p) in ("router", "hosts")], ids=_name)
def test_the_router_is_no_command(path: Path) -> None:
    for module in _imports(path):
        assert not _inside(module, "kvcached.cli"), module


RAY_NODES = PACKAGE / "hosts" / "ray_nodes.py"


@pytest.mark.parametrize("path", [p for p in SOURCES if p != RAY_NODES], ids=_name)
def test_ray_is_imported_in_one_file_and_several_hosts_in_one_command(path: Path) -> None:
    for module in _imports(path):
        assert _top(module) != "ray", module
        if _room(path) != "hosts" and path != PACKAGE / "cli" / "serve.py":
            assert not _inside(module, "kvcached.hosts"), module


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_only_the_command_line_imports_the_demo_and_the_benchmarks(path: Path) -> None:
    if _room(path) not in ("demo", "bench", "cli"):
        assert not [m for m in _imports(path) if _inside(m, "kvcached.demo", "kvcached.bench")]


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_torch_only_in_views_engines_demo_and_benchmarks(path: Path) -> None:
    if _room(path) not in ("engines", "demo", "bench") and path.name != "views.py":
        assert "torch" not in {_top(module) for module in _imports(path)}


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name != "config.py"], ids=_name)
def test_the_environment_is_read_only_in_config(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv"):
            pytest.fail(f"{_name(path)}:{node.lineno} reads the environment")
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            assert not {"environ", "getenv"} & {alias.name for alias in node.names}


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_no_broad_except_but_at_an_edge(path: Path) -> None:
    for function, handler in _handlers(ast.parse(path.read_text())):
        caught = ast.unparse(handler.type) if handler.type else "everything"
        broad = handler.type is None or {"Exception", "BaseException"} & set(_names(handler.type))
        where = f"{path.relative_to(PACKAGE)}:{function}"
        assert not broad or where in BROAD_EXCEPT_ALLOWED, f"{where} catches {caught}"


def _handlers(tree: ast.Module) -> Iterator[tuple[str, ast.ExceptHandler]]:
    def visit(node: ast.AST, function: str) -> Iterator[tuple[str, ast.ExceptHandler]]:
        for child in ast.iter_child_nodes(node):
            inner = function
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                inner = child.name
            elif isinstance(child, ast.ExceptHandler):
                yield function, child
            yield from visit(child, inner)

    yield from visit(tree, "<module>")


def _names(node: ast.AST) -> Iterator[str]:
    return (inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name))


@pytest.mark.parametrize("path", [*SOURCES, *CPP], ids=_name)
def test_files_stay_small(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES, f"{_name(path)} has {lines} lines; split it"


@pytest.mark.parametrize("path", CPP, ids=_name)
def test_only_the_bindings_know_python(path: Path) -> None:
    if "bindings" not in path.relative_to(ROOT / "csrc").parts[0]:
        text = path.read_text()
        assert "pybind11" not in text and "Python.h" not in text, _name(path)


def test_the_sources_were_found() -> None:
    assert len(SOURCES) > 5 and CPP
