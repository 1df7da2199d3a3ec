"""The shape of the sources that no linter knows: one namespace, small modules, clients that stand alone."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from proto.generate import ROOT

ROOTS = ("proxy", "worker", "storage", "registry", "mesh", "gen")
# style.md, "Size": never over 600 lines a module, never 80 a function.
MODULE_LINES = 600
FUNCTION_LINES = 80


# What a module that calls itself pure in its docstring may not import (style.md, "Who may import whom").
IMPURE = ("grpc", "asyncio", "os", "time", "socket", "subprocess", "threading", "random", "helios.api", "opentelemetry")
# proxy/helios/proxy/client.py: a `client.py` further down serves its own component.
COMPONENT_DEPTH = 4
PURE = re.compile(r"(^|[.:]\s+)Pure\b|\bmodule is pure\b|\bpure state machine\b|\bthe pure part\b", re.MULTILINE)


def modules() -> list[Path]:
    folders = [*(name for name in ROOTS if name != "gen"), "proto", "requirements", "tests"]
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(path.relative_to(ROOT) for path in paths if "node_modules" not in path.parts)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def imported(tree: ast.AST) -> Iterator[str]:
    """Yields what is imported where the program runs; imports for type checkers alone don't count."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield from imported(node)


@pytest.mark.parametrize("root", ROOTS)
def test_namespace_has_no_init_file(root: str) -> None:
    """An __init__.py there would hide the parts of the namespace in the other five folders."""
    assert (ROOT / root / "helios").is_dir()
    assert not (ROOT / root / "helios" / "__init__.py").exists()


@pytest.mark.parametrize("component", ["proxy", "worker", "storage", "registry", "mesh"])
def test_component_init_is_a_docstring_and_at_most_imports(component: str) -> None:
    tree = ast.parse((ROOT / component / "helios" / component / "__init__.py").read_text())
    assert ast.get_docstring(tree)
    rest = [node for node in tree.body[1:] if not isinstance(node, ast.Import | ast.ImportFrom)]
    assert not [
        node for node in rest if not (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__")
    ]


@pytest.mark.parametrize("path", modules(), ids=str)
def test_modules_and_functions_are_small(path: Path) -> None:
    text = (ROOT / path).read_text()
    assert len(text.splitlines()) <= MODULE_LINES
    for node in functions(ast.parse(text)):
        assert (node.end_lineno or node.lineno) - node.lineno < FUNCTION_LINES, f"{node.name}, line {node.lineno}"


@pytest.mark.parametrize("root", [root for root in ROOTS if root != "gen"])
def test_what_catches_every_error_says_why(root: str) -> None:
    """On its own line. ruff's BLE001 asks for it only where the error ends: it passes whoever raises or logs one."""
    caught = []
    for path in (path for path in modules() if path.parts[0] == root):
        text = (ROOT / path).read_text()
        for handler in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ExceptHandler)):
            _, _, comment = text.splitlines()[handler.lineno - 1].partition("# ")
            if "Exception" in caught_names(handler) and not comment.removeprefix("noqa: BLE001"):
                caught.append(f"{path}:{handler.lineno}")
    assert caught == []


def test_clients_bring_nothing_of_their_component_along() -> None:
    """A client may be imported by other components (pyproject.toml).

    So what it imports, and what that imports in turn, is values and conversions: no database, no server, no engine.
    """
    allowed = {*sys.stdlib_module_names, "grpc", "google", "structlog", "tenacity"}
    for client in (path for path in modules() if path.name == "client.py" and len(path.parts) == COMPONENT_DEPTH):
        package = ".".join(client.parts[1:-1])
        pending, seen = [client], set[Path]()
        while pending:
            path = pending.pop()
            seen.add(path)
            for name in imported(ast.parse((ROOT / path).read_text())):
                if f"{name}.".startswith(f"{package}."):
                    pending += [inner for inner in module_files(client.parts[0], name) if inner not in seen]
                elif not name.startswith(("helios.api.", "helios.mesh.")):
                    assert name.split(".")[0] in allowed, f"{client} brings {name} along, by {path}"


def caught_names(handler: ast.ExceptHandler) -> list[str]:
    """Returns what a handler catches; everything where it names nothing."""
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return ["Exception" if kind is None else ast.unparse(kind) for kind in kinds]


def module_files(root: str, name: str) -> list[Path]:
    """Finds the files behind an imported name, which may be a module or a name inside one."""
    stems = [Path(root, *name.split(".")), Path(root, *name.split(".")[:-1])]
    candidates = [stem.with_suffix(".py") for stem in stems] + [stem / "__init__.py" for stem in stems]
    return [path for path in candidates if (ROOT / path).is_file()]


def test_modules_that_call_themselves_pure_are() -> None:
    """Decisions without I/O, clock and tasks can be tested with nothing but values."""
    pure_count = 0
    for path in (path for path in modules() if path.parts[0] in ROOTS and path.name != "__init__.py"):
        tree = ast.parse((ROOT / path).read_text())
        if PURE.search(ast.get_docstring(tree) or ""):
            pure_count += 1
            impure = [name for name in imported(tree) if f"{name}.".startswith(tuple(f"{bad}." for bad in IMPURE))]
            assert not impure, f"{path}: {impure}"
    assert pure_count > 10
