"""From eager to compiled behind the public address: no request is lost, and what goes wrong leaves the eager one."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.scenarios.running_mesh import MODEL, RunningMesh
from tests.scenarios.streaming_load import streaming

SIMULATED = "swapped"
TOPICS = ("rivers", "bread", "chess", "stars", "ships", "glass", "maps", "wool")


@pytest.fixture(scope="module")
def simulated(mesh: RunningMesh) -> Iterator[RunningMesh]:
    """The mesh with one more model, whose engine is the simulated one."""
    added = mesh.helios("models", "add", SIMULATED, f"embedded:{MODEL}")
    assert added.returncode == 0, added.stdout + added.stderr
    yield mesh
    assert mesh.helios("models", "rm", SIMULATED).returncode == 0


def set_up(mesh: RunningMesh, model: str, *assignments: str) -> None:
    """Sets a model to have both forms, and lets the next replica begin."""
    assert mesh.helios("scale", model, "0").returncode == 0
    mesh.wait(lambda: not replicas(mesh, model), 60, "no replica is left")
    options = [part for text in ("compilation=eager_then_compiled", *assignments) for part in ("--set", text)]
    result = mesh.helios("models", "set", model, *options)
    assert result.returncode == 0, result.stdout + result.stderr


def replicas(mesh: RunningMesh, model: str) -> list[dict[str, Any]]:
    return [replica for replica in mesh.replicas() if replica["model"] == model]


def ids(mesh: RunningMesh, model: str) -> list[str]:
    return [replica["replica_id"] for replica in replicas(mesh, model)]


def forms(mesh: RunningMesh, model: str) -> list[tuple[str, str]]:
    """State and form of each replica."""
    return [
        (
            replica["state"].removeprefix("REPLICA_STATE_"),
            replica.get("compilation", "").removeprefix("COMPILATION_MODE_"),
        )
        for replica in replicas(mesh, model)
    ]


def failures(mesh: RunningMesh) -> list[str]:
    """Why replicas failed lately, as operators are told."""
    answer = mesh.request("/admin/v1/replicas", is_admin=True)
    return [failed["replica"]["failure"]["reason"] for failed in answer.json["failures"]]


def compiling(mesh: RunningMesh, model: str) -> dict[str, Any] | None:
    """The replica that compiles, once it has a process."""
    found = [one for one in replicas(mesh, model) if one.get("in_background") and int(one.get("pid", 0))]
    return found[0] if found and found[0]["state"] != "REPLICA_STATE_READY" else None


def test_a_compiled_replica_takes_over_under_load_though_the_first_one_is_killed(simulated: RunningMesh) -> None:
    mesh = simulated
    options = ("engine=simulated", "options.compile_seconds=2", "options.decode_seconds_per_token=0.02")
    set_up(mesh, SIMULATED, *options)
    with streaming(mesh, SIMULATED, clients=3, max_tokens=60) as seen:
        mesh.wait(lambda: forms(mesh, SIMULATED) == [("READY", "EAGER")], 30, "it started eager")
        mesh.wait(lambda: compiling(mesh, SIMULATED) is not None, 30, "another one compiles")
        killed = compiling(mesh, SIMULATED)
        assert killed is not None
        os.kill(int(killed["pid"]), signal.SIGKILL)
        mesh.wait(lambda: killed["replica_id"] not in ids(mesh, SIMULATED), 30, "it is gone")
        assert ("READY", "EAGER") in forms(mesh, SIMULATED)
        mesh.wait(lambda: forms(mesh, SIMULATED) == [("READY", "COMPILED")], 60, "the next one took over")
        time.sleep(1)
    assert seen.failures == []
    assert seen.answer_count >= 3
    status = json.loads(mesh.helios("status", "--json").stdout)
    own = [entry["replica"] for entry in status["replicas"] if entry["replica"]["model"] == SIMULATED]
    assert [replica["compilation"] for replica in own] == ["COMPILATION_MODE_COMPILED"]
    told = {failed["replica"]["replica_id"]: failed["replica"]["failure"] for failed in status["failures"]}
    assert told[killed["replica_id"]]["reason"] == "REPLICA_DIED"


def test_a_model_that_can_not_be_compiled_is_served_eager_and_says_why(simulated: RunningMesh) -> None:
    mesh = simulated
    set_up(mesh, SIMULATED, "engine=simulated", "options.compile_failure_ratio=1", "options.compile_seconds=0")
    with streaming(mesh, SIMULATED, clients=1, max_tokens=20) as seen:
        # The second try comes after a second, the third after four more.
        mesh.wait(lambda: failures(mesh).count("SIMULATED_COMPILE_FAILURE") == 3, 60, "it was tried three times")
        mesh.wait(lambda: forms(mesh, SIMULATED) == [("READY", "EAGER")], 30, "the eager one serves on")
    assert seen.failures == []
    assert "can't be compiled" in mesh.helios("status").stdout.replace("\n", " ")


@pytest.mark.soak
@pytest.mark.real_model
@pytest.mark.timeout(1800)
def test_the_real_model_is_swapped_under_load_and_answers_as_before(tmp_path: Path) -> None:
    """In float32, where compiled code rounds so nearly alike that greedy answers are the same."""
    mesh = RunningMesh(tmp_path / "state", ["proxy.swap.after_seconds=10"])
    mesh.start()
    try:
        set_up(mesh, MODEL, "dtype=float32")
        began = time.monotonic()
        assert mesh.chat().status == 200
        first_seconds = time.monotonic() - began
        before = [_greedy(mesh, topic) for topic in TOPICS]
        with streaming(mesh, MODEL, clients=2, max_tokens=128) as seen:
            alone_at = time.monotonic()
            mesh.wait(lambda: compiling(mesh, MODEL) is not None, 120, "another one compiles")
            compiling_at = time.monotonic()
            mesh.wait(lambda: ("READY", "COMPILED") in forms(mesh, MODEL), 1200, "it is compiled")
            ready_at = time.monotonic()
            mesh.wait(lambda: forms(mesh, MODEL) == [("READY", "COMPILED")], 120, "it took over")
            taken_over_at = time.monotonic()
            time.sleep(20)
            ended_at = time.monotonic()
        after = [_greedy(mesh, topic) for topic in TOPICS]
        rates = [
            seen.tokens_per_second(*span)
            for span in ((alone_at, compiling_at), (compiling_at + 2, ready_at), (taken_over_at, ended_at))
        ]
        print(
            f"first answer {first_seconds:.2f} s; compile {ready_at - compiling_at:.0f} s; tokens/s alone, beside the"
            f" compile, compiled: {', '.join(f'{rate:.1f}' for rate in rates)}; {seen.answer_count} answers"
        )
        assert seen.failures == []
        assert after == before
        alone, beside, _ = rates
        # What it shares beside the processor's time: caches, memory's bandwidth, a core's two threads.
        assert beside > 0.7 * alone
    finally:
        status = mesh.stop()
    assert status == 0


def _greedy(mesh: RunningMesh, topic: str) -> str:
    messages = [{"role": "user", "content": f"Write two sentences about {topic}."}]
    answer = mesh.chat(messages=messages, max_tokens=48)
    assert answer.status == 200, answer.body
    return str(answer.json["choices"][0]["message"]["content"])
