"""Sleep and wake with real processes: what is booked when, who may order it, and what a wrong wake leads to."""

import asyncio
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import pytest

from helios.api.worker.v1.supervisor_service_pb2_grpc import (
    SupervisorServiceStub,
    add_SupervisorServiceServicer_to_server,
)
from helios.mesh.channel import Dialer
from helios.mesh.identity import CertificateAuthority, IdentityFiles
from helios.mesh.server import MeshServer
from helios.mesh.tasks import task_scope
from helios.worker.supervisor.attach_servicer import AttachServicer
from helios.worker.supervisor.commands import Drain, Sleep, Wake
from helios.worker.supervisor.records import DeviceMeasure, Health, ReplicaState
from tests.worker.supervisor.fakes import RULES, WAIT_SECONDS, FakeLauncher, Node, living, running_node, start_of

S = ReplicaState
GIB = 1 << 30
LEFT_BYTES = 64 << 20


async def start(node: Node, replica_id: str = "r1") -> None:
    assert node.supervisor.execute(f"start-{replica_id}", start_of(replica_id)).is_accepted
    await node.wait_state(replica_id, S.READY)


async def until_state(node: Node, replica_id: str, state: ReplicaState) -> None:
    """Waits until a replica is in a state now, whatever it went through before."""
    async with asyncio.timeout(WAIT_SECONDS):
        while (view := node.replica(replica_id)) is None or view.state is not state:
            await asyncio.sleep(0.01)


async def until_booked(node: Node, booked_bytes: int) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while node.booked_bytes != booked_bytes:
            await asyncio.sleep(0.01)


def refusal(node: Node, command: Sleep | Wake, number: int = 0) -> str:
    return node.supervisor.execute(f"refused-{number}-{command}", command).refused_reason


async def test_a_sleeping_replica_books_what_it_left_and_everything_again_before_it_wakes(folder: Path) -> None:
    async with running_node(folder, launcher=FakeLauncher(r1="drowsy"), memory_bytes=GIB + LEFT_BYTES) as node:
        await start(node)
        assert node.supervisor.execute("sleep", Sleep("r1")).is_accepted
        await until_booked(node, LEFT_BYTES)
        # Its memory serves another one meanwhile, and is not there to wake into.
        await start(node, "r2")
        assert refusal(node, Wake("r1")) == "NO_CAPACITY"
        node.supervisor.execute("drain", Drain("r2", 1.0))
        await until_booked(node, LEFT_BYTES)
        assert node.supervisor.execute("wake", Wake("r1")).is_accepted
        assert node.booked_bytes == GIB
        await until_state(node, "r1", S.READY)
        assert node.states("r1")[-4:] == [S.READY, S.ASLEEP, S.WAKING, S.READY]
        view = node.replica("r1")
        assert view is not None
        assert view.wake_count == 1
        await node.supervisor.end_all(1)


async def test_what_is_measured_while_it_falls_asleep_is_no_news_of_sleep(folder: Path) -> None:
    async with running_node(folder, launcher=FakeLauncher(r1="drowsy")) as node:
        await start(node)
        assert node.supervisor.execute("sleep", Sleep("r1")).is_accepted
        node.supervisor.note_memory("r1", GIB // 2)
        assert node.booked_bytes == GIB
        await until_booked(node, LEFT_BYTES)
        node.supervisor.note_memory("r1", 2 * LEFT_BYTES)
        assert node.booked_bytes == 2 * LEFT_BYTES
        await node.supervisor.end_all(1)


async def test_a_wake_with_wrong_weights_fails_the_replica_with_its_tree(folder: Path) -> None:
    async with running_node(folder, launcher=FakeLauncher(r1="muddled")) as node:
        await start(node)
        node.supervisor.execute("sleep", Sleep("r1"))
        await until_booked(node, LEFT_BYTES)
        node.supervisor.execute("wake", Wake("r1"))
        view = await node.wait_state("r1", S.FAILED)
        assert view.failure is not None
        assert view.failure.reason == "CANARY_FAILED"
        assert view.process is not None
        assert living(view.process) == []
        assert node.booked_bytes == 0


async def test_sleep_is_refused_where_it_can_not_be(folder: Path) -> None:
    async with running_node(folder, launcher=FakeLauncher()) as node:
        await start(node)
        ack = node.supervisor.execute("sleep", Sleep("r1"))
        assert ack.refused_reason == "SLEEP_UNSUPPORTED"
        assert "runs on a CPU" in ack.message
        assert "stage its model instead" in ack.message or "stage the model instead" in ack.message
        assert refusal(node, Wake("r1")) == ""
        assert refusal(node, Sleep("nobody")) == "REPLICA_NOT_FOUND"
        await node.supervisor.end_all(1)


async def test_after_its_cycles_a_replica_is_not_put_to_sleep_again(folder: Path) -> None:
    rules = replace(RULES, sleep_cycle_limit=1)
    async with running_node(folder, launcher=FakeLauncher(r1="drowsy"), rules=rules) as node:
        await start(node)
        node.supervisor.execute("sleep", Sleep("r1"))
        node.supervisor.execute("wake", Wake("r1"))
        await until_state(node, "r1", S.READY)
        assert refusal(node, Sleep("r1")) == "SLEEP_CYCLES_USED_UP"
        await node.supervisor.end_all(1)


async def test_a_restarted_supervisor_takes_a_sleeping_replica_over_with_what_it_books(folder: Path) -> None:
    async with running_node(folder, launcher=FakeLauncher(r1="drowsy")) as node:
        await start(node)
        node.supervisor.execute("sleep", Sleep("r1"))
        await until_booked(node, LEFT_BYTES)
        node.supervisor.write_list()
    async with running_node(folder, launcher=FakeLauncher()) as node:
        assert node.booked_bytes == LEFT_BYTES
        assert await node.supervisor.wait_returned(WAIT_SECONDS)
        assert node.supervisor.execute("wake", Wake("r1")).is_accepted
        await until_state(node, "r1", S.READY)
        assert node.booked_bytes == GIB
        await node.supervisor.end_all(1)


async def test_replicas_on_a_lost_device_fail_and_nothing_is_started_there(folder: Path) -> None:
    async with running_node(folder, launcher=FakeLauncher()) as node:
        await start(node)
        node.supervisor.note_measure(DeviceMeasure("cpu:0", Health.LOST, "gone"))
        view = await node.wait_state("r1", S.FAILED)
        assert view.failure is not None
        assert view.failure.reason == "DEVICE_LOST"
        ack = node.supervisor.execute("again", start_of("r2"))
        assert ack.refused_reason == "NO_CAPACITY"


@pytest.mark.parametrize("component", ["edge", "admin-edge", "proxy"])
async def test_only_a_worker_opens_the_door_to_sleep(folder: Path, component: str) -> None:
    authority = CertificateAuthority.open(folder / "pki")
    identity, caller = (authority.issue(name, folder / "pki" / name) for name in ("worker", component))
    service = "helios.api.worker.v1.SupervisorService"
    policy = {service: frozenset({"worker"})}
    server = MeshServer(listen="127.0.0.1:0", identity=identity, policy=policy)
    async with task_scope() as group:
        async with running_node(folder, launcher=FakeLauncher()) as node:
            servicer = AttachServicer(node.supervisor, group=group, report_interval_seconds=1, orphan_seconds=1)
        add_SupervisorServiceServicer_to_server(servicer, server.grpc)
        await _refused(server, caller)


async def _refused(server: MeshServer, caller: IdentityFiles) -> None:
    async with server, Dialer(server.address, identity=caller, peer="worker") as dialer:
        call = dialer.stub(SupervisorServiceStub).Attach(iter(()))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call.read()
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
