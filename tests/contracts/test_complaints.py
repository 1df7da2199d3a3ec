"""The page of complaints (`tests/COMPLAINTS.md`) names tests and benchmarks that there are."""

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PAGE = (TESTS / "COMPLAINTS.md").read_text()
# number, where it was reported, the complaint, what holds it
ROWS = re.findall(r"^\| (\d+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", PAGE, re.MULTILINE)
COMPLAINT_COUNT = 30


@cache
def functions(path: str) -> frozenset[str]:
    """Names of a file's functions, those of its classes included."""
    nodes = ast.walk(ast.parse((TESTS / path).read_text()))
    return frozenset(node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def benchmarks() -> set[str]:
    """Names of the measurements that have bars."""
    bars = tomllib.loads((TESTS / "benchmarks" / "bars.toml").read_text())
    return {bar["name"] for bar in bars["bar"]}


def test_every_complaint_has_its_tests() -> None:
    assert {int(number) for number, *_ in ROWS} == set(range(1, COMPLAINT_COUNT + 1))
    assert len(ROWS) == PAGE.count("\n| ") - PAGE.count("\n| |"), "a row is not read"
    assert [row for row in ROWS if not re.search(r"`\S+`", row[-1])] == []


def test_every_test_that_is_named_exists() -> None:
    named = [name for *_, holders in ROWS for name in re.findall(r"`([^`]+)`", holders)]
    tests = [name.partition("::") for name in named if "::" in name]
    assert [f"{path}::{name}" for path, _, name in tests if not (TESTS / path).is_file()] == []
    assert [f"{path}::{name}" for path, _, name in tests if name not in functions(path)] == []
    assert {name for name in named if "::" not in name} <= benchmarks()
