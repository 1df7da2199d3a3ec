"""Every engine is held to the same contracts, each in a process of its own that makes it as a replica does."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from helios.worker.launcher.client import launcher_environment
from helios.worker.replica.settings import EngineSettings
from helios.worker.replica.spec import ReplicaSpec
from tests.worker.replica.support import MODEL, REVISION, ROOT, source_path

SOURCE = Path(__file__).with_name("engine_contracts.py")
# Importing torch and vLLM on a busy machine, then some twenty contracts.
SECONDS = 280
OPTIONS = {
    "simulated": {"decode_seconds_per_token": "0.002"},
    "custom": {"class": "tests.worker.engines.lit_examples:Echo"},
}
# One parameter a model: fp32 on both sides makes rounding the only difference.
SETTINGS = EngineSettings(dtype="float32")
ENGINES = [
    pytest.param("simulated"),
    pytest.param("custom"),
    pytest.param("transformers", marks=pytest.mark.real_model),
    pytest.param("vllm", marks=pytest.mark.real_model),
]


def contracts() -> Iterator[tuple[str, set[str]]]:
    """Gives the names of the contracts with their marks, without importing them."""
    for node in ast.parse(SOURCE.read_text()).body:
        if isinstance(node, ast.AsyncFunctionDef):
            marks = {ast.unparse(mark) for mark in node.decorator_list}
            if "contract" in marks:
                yield node.name, marks


def cases() -> Iterator[Any]:
    """Gives each engine with each contract that it can be held to."""
    for engine in ENGINES:
        (name,) = engine.values
        for contract, marks in contracts():
            is_out = ("needs_tokens" in marks and name == "custom") or (
                "needs_chance" in marks and name in {"custom", "simulated"}
            )
            if not is_out:
                yield pytest.param(name, contract, marks=engine.marks)


def a_spec(engine: str, model: Path) -> ReplicaSpec:
    """Returns what a replica with an engine is told."""
    return ReplicaSpec(
        replica_id=f"contracts-{engine}",
        model=MODEL,
        revision=REVISION,
        model_path=str(model),
        engine=engine,
        options=OPTIONS.get(engine, {}),
        settings=SETTINGS,
        kv_cache_bytes=192 << 20,
        max_context_tokens=2048,
        created_at=datetime.now(UTC),
    )


def run(module: str, spec: ReplicaSpec) -> subprocess.CompletedProcess[str]:
    """Runs a module beside this one with a spec, in a launcher's environment."""
    path = os.pathsep.join([source_path(), str(ROOT)])
    environment = launcher_environment(os.environ) | {"PYTHONPATH": path}  # noqa: TID251
    command = [sys.executable, "-m", f"tests.worker.engines.{module}", json.dumps(spec.to_document())]
    return subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False
    )


@cache
def outcome(engine: str, model: Path) -> dict[str, Any]:
    """Runs all contracts against an engine, once."""
    done = run("run_engine", a_spec(engine, model))
    if done.returncode != 0:
        # Remembered too: every contract says it, and the engine is not started again for each.
        return {"errors": {name: done.stderr[-3000:] for name, _ in contracts()}, "notes": {}}
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return results


@pytest.mark.parametrize(("engine", "contract"), list(cases()))
def test_an_engine_keeps_its_promise(engine: str, contract: str, smollm2_directory: Path) -> None:
    problem = outcome(engine, smollm2_directory)["errors"][contract]
    if problem:
        pytest.fail(problem, pytrace=False)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_contract_of_an_engine_was_run(engine: str, smollm2_directory: Path) -> None:
    listed = {case.values[1] for case in cases() if case.values[0] == engine}
    assert len(listed) > 10
    assert outcome(engine, smollm2_directory)["errors"].keys() == listed


@pytest.mark.real_model
def test_vllm_s_own_reader_of_outputs_is_replaced(smollm2_directory: Path) -> None:
    assert "engine outputs" in outcome("vllm", smollm2_directory)["notes"]["tasks"]


@pytest.mark.real_model
def test_an_unknown_version_of_vllm_is_used_as_it_is(smollm2_directory: Path) -> None:
    done = run("unknown_version", a_spec("vllm", smollm2_directory))
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["replaced"] == []
    assert seen["templates"] == []
    assert seen["reader"] == seen["stock_reader"]
    assert seen["failure"] is None
    assert any(warning.startswith("unknown vLLM version") for warning in seen["warnings"])
    assert seen["tokens"] == 4
    assert seen["events"][-1] == "data: [DONE]\n\n"


@pytest.mark.real_model
def test_transformers_draws_the_tokens_that_vllm_draws(smollm2_directory: Path) -> None:
    """Greedy, in fp32, one request at a time: both compute the same numbers up to rounding.

    Where the likeliest two tokens are closer than the rounding, either may be drawn, and what follows differs.
    """
    ours, theirs = (outcome(engine, smollm2_directory)["notes"]["greedy"] for engine in ("transformers", "vllm"))
    compared = 0
    for mine, other in zip(ours, theirs, strict=True):
        for index, (token, reference) in enumerate(zip(mine["ids"], other["ids"], strict=True)):
            if token != reference:
                assert mine["margins"][index] < 1e-2, f"token {index}: {token} against {reference}"
                break
            assert mine["logprobs"][index] == pytest.approx(other["logprobs"][index], abs=1e-2)
            compared += 1
    assert compared >= 48
