"""The contract with vLLM: one test for each thing that Helios leans on and vLLM does not promise to keep.

When one of these fails after an upgrade, `helios.worker.engines.vllm.compat` is the only module to look at. Importing
vLLM takes ten seconds and patches torch, so the contracts run in a process of their own, all at once.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helios.worker.launcher.client import launcher_environment
from tests.worker.replica.support import ROOT, source_path

SOURCES = [
    Path(__file__).with_name(f"{name}_contracts.py".removeprefix("_"))
    for name in ("", "kind", "setting", "sleep", "weight", "early", "continuation", "loss", "output")
]
# Two processes of tests would each import vLLM once.
pytestmark = pytest.mark.real_model
# On a busy machine, importing takes several times as long.
SECONDS = 200


def names() -> list[str]:
    """Returns the names of the contracts, without importing them."""
    nodes = [node for source in SOURCES for node in ast.parse(source.read_text()).body]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    return [node.name for node in functions if any(ast.unparse(mark) == "contract" for mark in node.decorator_list)]


@pytest.fixture(scope="module")
def outcome(smollm2_directory: Path) -> dict[str, str]:
    path = os.pathsep.join([source_path(), str(ROOT)])
    own = {"PYTHONPATH": path, "HELIOS_TEST_MODEL": str(smollm2_directory)}
    environment = launcher_environment(os.environ) | own  # noqa: TID251
    command = [sys.executable, "-m", "tests.worker.engines.output_contracts"]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return results


def test_every_contract_was_run(outcome: dict[str, str]) -> None:
    """One that is not found by its mark would be neither run nor missed."""
    assert len(outcome) > 50
    assert sorted(outcome) == sorted(names())


@pytest.mark.parametrize("name", names())
def test_contract(outcome: dict[str, str], name: str) -> None:
    assert outcome[name] == ""
