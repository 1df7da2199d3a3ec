"""The shape of the sources that no linter knows: one namespace, small modules, clients that stand alone."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from proto.generate import ROOT

ROOTS = ("proxy", "worker", "storage", "registry", "mesh", "gen")
# style.md, "Size": never over 600 lines a module, never 80 a function.
MODULE_LINES = 600
FUNCTION_LINES = 80


def modules() -> list[Path]:
    folders = [*(name for name in ROOTS if name != "gen"), "proto", "requirements", "tests"]
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(path.relative_to(ROOT) for path in paths if "node_modules" not in path.parts)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


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


def test_clients_import_only_contracts_and_mesh() -> None:
    """A client may be imported by other components (pyproject.toml), so it must not bring its own component along."""
    for path in (path for path in modules() if path.name == "client.py" and path.parts[0] in ROOTS):
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            inside = [name for name in names if name.split(".")[0] == "helios"]
            assert all(name.startswith(("helios.api.", "helios.mesh")) for name in inside), f"{path}: {inside}"
