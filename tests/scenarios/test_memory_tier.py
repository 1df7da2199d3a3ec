"""A replica of the real engine starts from sealed memory, and an agent that dies below it gets its files back."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.scenarios.running_mesh import MODEL, RunningMesh

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]

TIER = '[{"name": "memory", "kind": "memory", "capacity_bytes": 2000000000}]'


@pytest.fixture
def own_mesh(tmp_path: Path) -> Iterator[RunningMesh]:
    # Without packed weights, which later starts would map in place of the checkpoint.
    running = RunningMesh(tmp_path / "state", [f"storage.tiers={TIER}", "worker.packed_weights_bytes=0"])
    running.start()
    try:
        yield running
    finally:
        status = running.stop()
    assert status == 0


def tiers(mesh: RunningMesh) -> list[str]:
    """Where the only revision is; nowhere while the agent does not answer."""
    asked = mesh.helios("cache", "status", "--json")
    revisions = json.loads(asked.stdout)["revisions"] if asked.returncode == 0 else []
    return list(revisions[0]["tiers"]) if revisions else []


def test_a_replica_starts_from_memory_that_outlives_the_agent(own_mesh: RunningMesh, tmp_path: Path) -> None:
    for _ in range(3):
        assert own_mesh.chat().status == 200
        assert own_mesh.helios("scale", MODEL, "0").returncode == 0
        own_mesh.wait(lambda: not own_mesh.replicas(), 120, "no replica is left")
    own_mesh.wait(lambda: "memory" in tiers(own_mesh), 120, "it is promoted")
    answer = own_mesh.chat(temperature=0)
    assert answer.status == 200
    (view,) = (tmp_path / "state" / "worker" / "sealed").iterdir()
    weights = view / "model.safetensors"
    supervisor = own_mesh.pid_of("worker")
    assert os.readlink(weights).startswith(f"/proc/{supervisor}/fd/")  # noqa: PTH115 - the link leads to no name
    (replica,) = own_mesh.replicas()
    assert psutil.pid_exists(int(replica["pid"]))
    os.kill(own_mesh.pid_of("storage"), signal.SIGKILL)
    log = tmp_path / "state" / "logs" / "storage.log"
    own_mesh.wait(lambda: "revision handed back" in log.read_text(), 120, "the files are back")
    assert "memory" in tiers(own_mesh)
    assert own_mesh.chat(temperature=0).json["choices"] == answer.json["choices"]
    assert [each["pid"] for each in own_mesh.replicas()] == [replica["pid"]]
