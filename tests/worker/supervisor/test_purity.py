"""The decisions are pure: no I/O, no clock, no tasks, no wire types."""

import ast
from pathlib import Path

import pytest

import helios.worker.supervisor as package

PURE = (
    "../early/growth",
    "../engines/vllm/kept_prompts",
    "../replica/kv_losses",
    "commands",
    "core_placement",
    "fence",
    "ledger",
    "life_actions",
    "life_stages",
    "life_events",
    "orders",
    "outbox",
    "records",
    "replica_machine",
)
FORBIDDEN = ("asyncio", "grpc", "helios.api", "opentelemetry", "os", "subprocess", "threading", "time")


@pytest.mark.parametrize("name", PURE)
def test_a_decision_imports_no_io(name: str) -> None:
    tree = ast.parse((Path(package.__path__[0]) / f"{name}.py").read_text())
    imported = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert not [module for module in imported if any(f"{module}.".startswith(f"{bad}.") for bad in FORBIDDEN)]
