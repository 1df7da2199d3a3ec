"""A model's engine settings, from the command line to the answer: they change the engine, and a start that can't ever
succeed is told to whoever asked for the model, once and at once.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.scenarios.running_mesh import RunningMesh

NAME = "tuned"
TOOL = {"type": "function", "function": {"name": "look", "strict": True, "parameters": {"type": "object"}}}


@pytest.fixture
def tuned(mesh: RunningMesh, smollm2_directory: Path) -> Iterator[str]:
    """A second name of the embedded model, with settings of its own; removed at the end."""
    said = mesh.helios("models", "add", NAME, str(smollm2_directory), "--set", "max_context_tokens=256", "--alias", "t")
    assert said.returncode == 0, said.stdout + said.stderr
    yield NAME
    assert mesh.helios("models", "rm", NAME).returncode == 0
    mesh.wait(lambda: all(replica["model"] != NAME for replica in mesh.replicas()), 60, "its replica is gone")


def settings_of(mesh: RunningMesh) -> dict[str, str]:
    shown = mesh.helios("models", "show", NAME, "--json")
    assert shown.returncode == 0, shown.stderr
    return dict(json.loads(shown.stdout)["engine_settings"])


def change(mesh: RunningMesh, *arguments: str) -> None:
    said = mesh.helios("models", "set", NAME, *arguments)
    assert said.returncode == 0, said.stdout + said.stderr


def test_settings_reach_the_engine_and_failures_reach_the_answer(mesh: RunningMesh, tuned: str) -> None:
    change(mesh, "--set", "tensor_parallel_size=2", "--set", "dtype=bfloat16")
    assert settings_of(mesh) == {"dtype": "bfloat16", "tensor_parallel_size": "2", "max_context_tokens": "256"}
    refused = mesh.chat(model="t")
    assert (refused.status, refused.error["code"]) == (400, "invalid_engine_settings"), refused.body
    assert "heads (9) must be divisible by tensor_parallel_size (2)" in refused.error["message"]
    assert refused.headers["x-should-retry"] == "false"
    before = time.monotonic()
    assert mesh.chat(model=tuned).error["message"] == refused.error["message"]
    assert time.monotonic() - before < 1.0, "told from memory, not tried again"
    shown = json.loads(mesh.helios("models", "show", NAME, "--json").stdout)
    assert shown["state"] == "MODEL_STATE_FAILED"
    assert "tensor_parallel_size (2)" in shown["failure"]

    change(mesh, "--unset", "tensor_parallel_size")
    assert mesh.chat(model="t").status == 200, "changed settings are tried at once"
    assert mesh.request(f"/v1/models/{NAME}").json["max_context_tokens"] == 256
    without = mesh.chat(model=tuned, tools=[TOOL])
    assert (without.status, without.error["code"]) == (400, "tool_calls_not_set_up")
    assert f"helios models set {NAME} --set tool_call_parser=hermes" in without.error["message"]


def test_mistakes_are_refused_where_they_are_made(mesh: RunningMesh, tuned: str) -> None:
    before = settings_of(mesh)
    unknown = mesh.helios("models", "set", tuned, "--set", "max_tokens=5")
    assert unknown.returncode == 1
    assert "there is no engine setting 'max_tokens'" in unknown.stderr
    assert "max_context_tokens" in unknown.stderr
    wrong = mesh.helios("models", "set", tuned, "--set", "dtype=int3", "--set", "max_batched_tokens=0")
    assert wrong.returncode == 1
    assert "dtype: 'int3' is not one of auto, float16, bfloat16, float32" in wrong.stderr
    assert "max_batched_tokens: 0" in wrong.stderr
    over_rest = mesh.request(f"/admin/v1/engine-settings/{NAME}", b'{"dtype": "int3"}', method="PUT", is_admin=True)
    assert (over_rest.status, over_rest.error["param"]) == (400, "dtype")
    assert settings_of(mesh) == before
