"""Asleep and staged, as clients and operators see them: the whole mesh, with an engine that can sleep (simulated)."""

import json
from collections.abc import Iterator
from typing import Any, Final

import pytest

from tests.scenarios.running_mesh import MODEL as EMBEDDED
from tests.scenarios.running_mesh import Answer, RunningMesh

MODEL: Final = "sleepy"
LEFT_BYTES: Final = 32 << 20


@pytest.fixture(scope="module")
def sleepy(mesh: RunningMesh) -> Iterator[RunningMesh]:
    """The mesh with one more model, whose engine is the simulated one, which can sleep without a GPU."""
    added = mesh.helios("models", "add", MODEL, f"embedded:{EMBEDDED}")
    assert added.returncode == 0, added.stdout + added.stderr
    set_options(mesh)
    yield mesh
    assert mesh.helios("models", "rm", MODEL).returncode == 0


def set_options(mesh: RunningMesh, **options: str) -> None:
    """Sets the engine's options, and lets the next replica have them."""
    assert mesh.helios("scale", MODEL, "0").returncode == 0
    mesh.wait(lambda: not replicas(mesh), 60, "no replica is left")
    settings = {"engine": "simulated", "options": {"can_sleep": "true", "left_bytes": str(LEFT_BYTES)} | options}
    body = json.dumps(settings).encode()
    answer = mesh.request(f"/admin/v1/engine-settings/{MODEL}", body, method="PUT", is_admin=True)
    assert answer.status == 200, answer.body


def replicas(mesh: RunningMesh) -> list[dict[str, Any]]:
    return [replica for replica in mesh.replicas() if replica["model"] == MODEL]


def only_replica(mesh: RunningMesh, state: str) -> dict[str, Any]:
    """Waits until there is one replica and it is in a state."""

    def has_it() -> bool:
        return [replica["state"] for replica in replicas(mesh)] == [f"REPLICA_STATE_{state}"]

    mesh.wait(has_it, 60, f"one replica, {state.lower()}")
    return replicas(mesh)[0]


def chat(mesh: RunningMesh) -> Answer:
    return mesh.chat(model=MODEL)


def put_to_sleep(mesh: RunningMesh) -> dict[str, Any]:
    replica = only_replica(mesh, "READY")
    result = mesh.helios("sleep", replica["replica_id"])
    assert result.returncode == 0, result.stdout + result.stderr
    mesh.wait(
        lambda: int(only_replica(mesh, "ASLEEP")["memory_bytes"]) < int(replica["memory_bytes"]) // 2,
        60,
        "memory is free",
    )
    return replica


def test_a_request_wakes_the_sleeping_replica_and_is_answered(sleepy: RunningMesh) -> None:
    before = chat(sleepy).json["choices"][0]["message"]["content"]
    booked = int(only_replica(sleepy, "READY")["memory_bytes"])
    replica = put_to_sleep(sleepy)
    asleep = only_replica(sleepy, "ASLEEP")
    assert int(asleep["memory_bytes"]) < booked
    assert sleepy.request(f"/v1/models/{MODEL}").json["replicas"]["asleep"] == 1
    answer = chat(sleepy)
    assert (answer.status, answer.json["choices"][0]["message"]["content"]) == (200, before)
    woken = only_replica(sleepy, "READY")
    assert (woken["replica_id"], woken["pid"], woken["wake_count"]) == (replica["replica_id"], replica["pid"], 1)
    assert int(woken["memory_bytes"]) == booked


@pytest.mark.parametrize("option", ["wrong_weights_ratio", "wake_failure_ratio"])
def test_a_wake_that_goes_wrong_is_never_answered_from_and_the_request_still_is(
    sleepy: RunningMesh, option: str
) -> None:
    right = chat(sleepy).json["choices"][0]["message"]["content"]
    set_options(sleepy, **{option: "1"})
    assert chat(sleepy).status == 200
    replica = put_to_sleep(sleepy)
    answer = chat(sleepy)
    assert (answer.status, answer.json["choices"][0]["message"]["content"]) == (200, right)
    assert only_replica(sleepy, "READY")["replica_id"] != replica["replica_id"]


def test_nobody_but_operators_puts_a_replica_to_sleep(sleepy: RunningMesh) -> None:
    chat(sleepy)
    replica = only_replica(sleepy, "READY")
    path = f"/admin/v1/replicas/{replica['replica_id']}:sleep"
    assert sleepy.request(path, b"{}").status == 404
    for stranger in ("/sleep?level=2", "/v1/sleep", "/wake_up", "/collective_rpc"):
        assert sleepy.request(stranger, b"{}").status in (404, 405)
    # The replica's own port takes certificates of the edge and the proxy only, and has no such call for them either.
    result = sleepy.grpcurl(sleepy.edge, "helios.api.worker.v1.SupervisorService/Attach")
    assert result.returncode != 0
    assert only_replica(sleepy, "READY")["pid"] == replica["pid"]


def test_a_staged_model_has_no_process_and_its_weights_in_memory(sleepy: RunningMesh) -> None:
    chat(sleepy)
    result = sleepy.helios("stage", MODEL)
    assert result.returncode == 0, result.stdout + result.stderr
    sleepy.wait(lambda: not replicas(sleepy), 60, "its replicas are gone")
    sleepy.wait(lambda: sleepy.request(f"/v1/models/{MODEL}").json["replicas"]["staged"] == 1, 60, "it is staged")
    (worker,) = sleepy.request("/admin/v1/workers", is_admin=True).json["workers"]
    assert int(worker["devices"][0]["telemetry"]["total_bytes"]) > int(worker["devices"][0]["memory_bytes"])
    staged = next(entry for entry in worker["staged"] if entry["model"] == MODEL)
    assert int(staged["resident_bytes"]) == int(staged["memory_bytes"]) > 256 << 20
    assert int(worker["host_memory"]["booked_bytes"]) >= int(staged["memory_bytes"])
    (shown,) = json.loads(sleepy.helios("status", "--json").stdout)["workers"]
    assert staged["revision"] in [entry["revision"] for entry in shown["staged"]]
    assert chat(sleepy).status == 200
    assert sleepy.helios("unstage", MODEL).returncode == 0
    sleepy.wait(lambda: sleepy.request(f"/v1/models/{MODEL}").json["replicas"]["staged"] == 0, 60, "it is unstaged")
