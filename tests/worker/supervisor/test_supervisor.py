"""The supervisor with real processes: what it starts, what it ends, and what it frees when."""

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import pytest

from helios.api.fleet.v1 import types_pb2 as types
from helios.api.worker.v1 import supervisor_service_pb2 as pb
from helios.api.worker.v1.supervisor_service_pb2_grpc import SupervisorServiceStub
from helios.mesh.errors import DiskFull, Unavailable
from helios.mesh.status import error_from_rpc
from helios.mesh.transfer.progress import TransferProgress
from helios.worker.replica.settings import EngineSettings, LoraAdapter, LoraSettings, SpeculativeDecoding, Task
from helios.worker.supervisor.commands import Drain, Evict, Stage, Start, Stop
from helios.worker.supervisor.outbox import LoadReport
from helios.worker.supervisor.process_tree import read_process
from helios.worker.supervisor.records import (
    MemoryItem,
    MemoryKind,
    ProcessIdentity,
    ReplicaState,
    ReplicaView,
)
from helios.worker.supervisor.wire import replica_to_proto
from tests.worker.supervisor.fakes import (
    REVISION,
    RULES,
    FakeLauncher,
    FakeWeights,
    Node,
    kill_and_wait,
    living,
    running_node,
    spawn_session,
    start_of,
)

S = ReplicaState


async def start_ready(node: Node, replica_id: str = "r1") -> ReplicaView:
    assert node.supervisor.execute(f"start-{replica_id}", start_of(replica_id)).is_accepted
    return await node.wait_state(replica_id, S.READY)


def assert_nothing_is_freed_before_the_tree_is_gone(node: Node, booked_bytes: int) -> None:
    for sighting in node.sightings:
        is_ended = sighting.view.state.is_ended
        assert sighting.booked_bytes == (0 if is_ended else booked_bytes)
        assert not (is_ended and sighting.living_count)


def process_of(view: ReplicaView) -> ProcessIdentity:
    assert view.process is not None
    return view.process


async def test_a_replica_starts_serves_and_drains(folder: Path) -> None:
    weights = FakeWeights()
    async with running_node(folder, launcher=FakeLauncher(), weights=weights) as node:
        view = await start_ready(node)
        assert len(living(process_of(view))) == 3
        assert [phase.phase for phase in view.phases] == ["fetch", "load", "report"]
        assert weights.released == []
        node.supervisor.execute("drain", Drain("r1", 2.0))
        await node.wait_state("r1", S.STOPPED)
        assert node.states("r1") == [S.FETCHING, S.LOADING, S.WARMING, S.READY, S.DRAINING, S.STOPPED]
        assert_nothing_is_freed_before_the_tree_is_gone(node, 1 << 30)
        await node.supervisor.end_all(1)
    assert weights.released == weights.borrowed == ["lease-0"]


async def test_a_killed_front_takes_its_whole_tree_along_before_anything_is_freed(folder: Path) -> None:
    async with running_node(folder, launcher=FakeLauncher()) as node:
        process = process_of(await start_ready(node))
        os.kill(process.pid, signal.SIGKILL)
        view = await node.wait_state("r1", S.FAILED)
        assert view.failure is not None
        assert view.failure.reason == "REPLICA_DIED"
        assert living(process) == []
        assert_nothing_is_freed_before_the_tree_is_gone(node, 1 << 30)


async def test_a_replica_that_ignores_drain_and_sigterm_is_killed_with_its_tree(folder: Path) -> None:
    rules = replace(RULES, limits=replace(RULES.limits, drain_grace_seconds=0.2))
    async with running_node(folder, launcher=FakeLauncher(r1="stubborn"), rules=rules) as node:
        process = process_of(await start_ready(node))
        node.supervisor.execute("drain", Drain("r1", 0.2))
        view = await node.wait_state("r1", S.STOPPED)
        assert view.failure is None
        assert living(process) == []
        assert_nothing_is_freed_before_the_tree_is_gone(node, 1 << 30)


async def test_a_stop_ends_a_replica_at_once(folder: Path) -> None:
    async with running_node(folder, launcher=FakeLauncher(r1="stubborn")) as node:
        process = process_of(await start_ready(node))
        node.supervisor.execute("stop", Stop("r1"))
        async with asyncio.timeout(2):
            await node.wait_state("r1", S.STOPPED)
        assert living(process) == []


@pytest.mark.parametrize("is_forked", [True, False])
async def test_reading_ahead_ends_with_the_replica(
    folder: Path, monkeypatch: pytest.MonkeyPatch, is_forked: bool
) -> None:
    ended = asyncio.Event()

    async def read_on(*_: str) -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            ended.set()

    monkeypatch.setattr("helios.worker.supervisor.replica_runner.read_ahead", read_on)
    launcher = FakeLauncher()
    async with running_node(folder, launcher=launcher) as node:
        if is_forked:
            await start_ready(node)
            assert not ended.is_set()
            node.supervisor.execute("stop", Stop("r1"))
            await node.wait_state("r1", S.STOPPED)
        else:
            launcher.gate = asyncio.Event()
            launcher.error = Unavailable("the launcher went away", reason="LAUNCHER_GONE")
            node.supervisor.execute("c", start_of("r1"))
            async with asyncio.timeout(20):
                while not launcher.specs:
                    await asyncio.sleep(0)
            await asyncio.sleep(0)
            launcher.gate.set()
            await node.wait_state("r1", S.FAILED)
        async with asyncio.timeout(20):
            await ended.wait()


async def test_a_hung_start_is_killed_at_its_deadline(folder: Path) -> None:
    rules = replace(RULES, limits=replace(RULES.limits, start_seconds=0.5))
    async with running_node(folder, launcher=FakeLauncher(r1="hang"), rules=rules) as node:
        node.supervisor.execute("c", start_of("r1"))
        view = await node.wait_state("r1", S.FAILED)
        assert view.failure is not None
        assert view.failure.reason == "START_TIMEOUT"
        assert living(process_of(view)) == []
        assert_nothing_is_freed_before_the_tree_is_gone(node, 1 << 30)


async def test_a_replica_that_reports_a_failure_fails_with_its_words(folder: Path) -> None:
    ended: list[ReplicaView] = []
    async with running_node(folder, launcher=FakeLauncher(r1="broken")) as node:
        node.supervisor.on_ended = ended.append
        node.supervisor.execute("c", start_of("r1"))
        view = await node.wait_state("r1", S.FAILED)
        assert view.failure is not None
        assert (view.failure.reason, view.failure.message) == ("ENGINE_FAILED", "no such weights")
        assert [(one.replica_id, one.failure) for one in ended] == [("r1", view.failure)]
        assert living(process_of(view)) == []


async def test_weights_that_do_not_come_fail_the_replica_and_free_its_memory(folder: Path) -> None:
    weights = FakeWeights(error=DiskFull("no room", reason="DISK_FULL"))
    async with running_node(folder, launcher=FakeLauncher(), weights=weights) as node:
        node.supervisor.execute("c", start_of("r1"))
        view = await node.wait_state("r1", S.FAILED)
        assert view.failure is not None
        assert view.failure.reason == "DISK_FULL"
        assert node.booked_bytes == 0


async def test_a_fork_that_fails_fails_the_replica_and_gives_the_weights_back(folder: Path) -> None:
    launcher, weights = FakeLauncher(), FakeWeights()
    launcher.error = Unavailable("the launcher went away", reason="LAUNCHER_GONE")
    async with running_node(folder, launcher=launcher, weights=weights) as node:
        node.supervisor.execute("c", start_of("r1"))
        view = await node.wait_state("r1", S.FAILED)
        assert view.failure is not None
        assert view.failure.reason == "LAUNCHER_GONE"
        await node.supervisor.end_all(1)
        await asyncio.sleep(0)
        assert weights.released == ["lease-0"]


async def test_a_stop_while_weights_are_fetched_frees_at_once(folder: Path) -> None:
    weights = FakeWeights(gate=asyncio.Event())
    async with running_node(folder, launcher=FakeLauncher(), weights=weights) as node:
        node.supervisor.execute("c", start_of("r1"))
        node.supervisor.execute("d", Stop("r1"))
        await node.wait_state("r1", S.STOPPED)
        assert node.booked_bytes == 0
        assert weights.borrowed == []


async def test_a_replica_shows_how_far_its_weights_are_until_they_are_there(folder: Path) -> None:
    coming = TransferProgress(3 << 20, 12 << 20, 1e6, 9.4)
    weights = FakeWeights(gate=asyncio.Event(), coming=coming)
    async with running_node(folder, launcher=FakeLauncher(), weights=weights) as node:
        assert node.supervisor.execute("c", start_of("r1")).is_accepted
        async with asyncio.timeout(20):
            while (view := node.supervisor.view().replicas[0]).fetch is None:
                await asyncio.sleep(0.01)
        assert view.fetch == coming
        told = replica_to_proto(view).fetch
        assert (told.done_bytes, told.total_bytes, told.bytes_per_second) == (3 << 20, 12 << 20, 1e6)
        assert told.remaining.ToMilliseconds() == 9400
        assert weights.gate is not None
        weights.gate.set()
        view = await node.wait_state("r1", S.READY)
        assert view.fetch is None
        assert not replica_to_proto(view).HasField("fetch")
        node.supervisor.execute("stop", Stop("r1"))
        await node.wait_state("r1", S.STOPPED)


@pytest.mark.parametrize(
    ("start", "reason"),
    [
        (start_of("r9", memory_bytes=5 << 30), "NO_CAPACITY"),
        (start_of("r9", engine="tea"), "UNKNOWN_ENGINE"),
        (start_of("r9", revision="sha256:../etc"), "BAD_REVISION"),
        (start_of("r9", revision=""), "BAD_REVISION"),
        (start_of("", model="m"), "START_INCOMPLETE"),
        (start_of("r1", revision="sha256:" + "cd" * 32), "ALREADY_EXISTS"),
        (Drain("nobody"), "REPLICA_NOT_FOUND"),
        (Stop("nobody"), "REPLICA_NOT_FOUND"),
        (Evict(REVISION), "REVISION_LEASED"),
    ],
)
async def test_what_can_not_be_done_is_refused_with_a_reason(folder: Path, start: Start, reason: str) -> None:
    weights = FakeWeights(gate=asyncio.Event())
    async with running_node(folder, launcher=FakeLauncher(), weights=weights) as node:
        assert node.supervisor.execute("first", start_of("r1")).is_accepted
        ack = node.supervisor.execute("second", start)
        assert ack.refused_reason == reason
        assert ack.message
        assert [view.replica_id for view in node.supervisor.view().replicas] == ["r1"]


async def test_a_repeated_start_starts_one_replica_also_under_another_command_id(folder: Path) -> None:
    launcher = FakeLauncher()
    async with running_node(folder, launcher=launcher) as node:
        acks = [node.supervisor.execute(name, start_of("r1")) for name in ("a", "a", "b")]
        assert all(ack.is_accepted for ack in acks)
        await node.wait_state("r1", S.READY)
        assert len(launcher.specs) == 1
        await node.supervisor.end_all(1)
        assert node.supervisor.execute("c", start_of("r1")).refused_reason == "REPLICA_ENDED"


async def test_a_cordoned_worker_starts_nothing_and_drains_everything(folder: Path) -> None:
    async with running_node(folder, launcher=FakeLauncher()) as node:
        await start_ready(node, "r1")
        await start_ready(node, "r2")
        node.supervisor.cordon()
        assert node.supervisor.execute("c", start_of("r3")).refused_reason == "WORKER_DRAINING"
        await node.supervisor.end_all(2)
        assert node.supervisor.view().replicas == ()
        assert node.booked_bytes == 0


async def test_a_revision_that_nobody_uses_is_evicted(folder: Path) -> None:
    weights = FakeWeights()
    async with running_node(folder, launcher=FakeLauncher(), weights=weights) as node:
        assert node.supervisor.execute("c", Evict(REVISION)).is_accepted
        async with asyncio.timeout(5):
            while not weights.evicted:
                await asyncio.sleep(0.01)


async def test_a_restarted_supervisor_adopts_what_runs_and_the_replica_never_notices(folder: Path) -> None:
    weights = FakeWeights()
    async with running_node(folder, launcher=FakeLauncher(), weights=weights) as node:
        before = await start_ready(node)
        node.supervisor.write_list()
    assert len(living(process_of(before))) == 3
    assert weights.released == []
    launcher = FakeLauncher()
    async with running_node(folder, launcher=launcher, weights=weights) as node:
        assert await node.supervisor.wait_returned(5.0)
        after = node.replica("r1")
        assert after is not None
        assert after.state is S.READY
        assert (after.process, after.address, after.order) == (before.process, before.address, before.order)
        assert after.phases == before.phases
        assert node.booked_bytes == 1 << 30
        assert weights.resumed == ["lease-0"]
        assert launcher.specs == []
        await node.supervisor.end_all(2)
    assert living(process_of(before)) == []
    assert "lease-0" in weights.released


async def test_an_adopted_replica_keeps_the_leases_of_its_adapters_and_its_draft_model(folder: Path) -> None:
    draft, adapter = "sha256:" + "d" * 64, "sha256:" + "a" * 64
    settings = EngineSettings(
        speculative_decoding=SpeculativeDecoding("draft_model", "d", draft, 2),
        lora=LoraSettings((LoraAdapter("x", "a", adapter),)),
        task=Task.GENERATE,
        cuda_graph_sizes=(1, 2),
    )
    weights = FakeWeights()
    async with running_node(folder, launcher=FakeLauncher(), weights=weights) as node:
        start = start_of("r1", settings=settings, served_names=("n",))
        assert node.supervisor.execute("start", start).is_accepted
        before = await node.wait_state("r1", S.READY)
        node.supervisor.write_list()
    assert weights.revisions == [REVISION, draft, adapter]
    assert weights.released == []
    async with running_node(folder, launcher=FakeLauncher(), weights=weights) as node:
        assert await node.supervisor.wait_returned(5.0)
        after = node.replica("r1")
        assert after is not None
        assert after.order == before.order
        assert weights.revisions[3:] == [REVISION, draft, adapter]
        for revision in (REVISION, draft, adapter):
            assert node.supervisor.execute(f"evict {revision}", Evict(revision)).refused_reason == "REVISION_LEASED"
        await node.supervisor.end_all(2)
    # The first lease of each other revision ends by itself.
    assert sorted(weights.released) == sorted(["lease-0", *weights.borrowed[4:]])


async def test_a_replica_is_adopted_from_its_hello_alone_when_the_list_is_lost(folder: Path) -> None:
    async with running_node(folder, launcher=FakeLauncher()) as node:
        before = await start_ready(node)
    (folder / "replicas.json").unlink()
    async with running_node(folder, launcher=FakeLauncher()) as node:
        async with asyncio.timeout(10):
            while (after := node.replica("r1")) is None or after.state is not S.READY:
                await asyncio.sleep(0.01)
        assert (after.process, after.address) == (before.process, before.address)
        assert node.booked_bytes == 1 << 30
        await node.supervisor.end_all(2)


async def test_a_listed_replica_that_does_not_come_back_is_held_and_then_killed(folder: Path) -> None:
    async with running_node(folder, launcher=FakeLauncher(r1="silent")) as node:
        before = await start_ready(node)
        node.supervisor.write_list()
    rules = replace(RULES, return_seconds=0.7)
    async with running_node(folder, launcher=FakeLauncher(), rules=rules) as node:
        assert not await node.supervisor.wait_returned(0.1)
        held = node.replica("r1")
        assert held is not None
        assert held.state is S.READY
        assert node.booked_bytes == 1 << 30
        view = await node.wait_state("r1", S.FAILED)
        assert view.failure is not None
        assert view.failure.reason == "REPLICA_LOST"
        assert living(process_of(before)) == []
        assert await node.supervisor.wait_returned(0.1)


async def test_what_a_dead_front_left_while_the_supervisor_was_away_is_killed(folder: Path) -> None:
    async with running_node(folder, launcher=FakeLauncher(r1="silent")) as node:
        process = process_of(await start_ready(node))
        node.supervisor.write_list()
    kill_and_wait(process)
    assert len(living(process)) == 2
    async with running_node(folder, launcher=FakeLauncher()) as node:
        view = await node.wait_state("r1", S.FAILED)
        assert view.failure is not None
        assert view.failure.reason == "REPLICA_DIED"
        assert living(process) == []


async def test_a_list_of_another_boot_is_not_believed(folder: Path) -> None:
    async with running_node(folder, launcher=FakeLauncher(r1="silent")) as node:
        process = process_of(await start_ready(node))
        node.supervisor.write_list()
    text = (folder / "replicas.json").read_text()
    (folder / "replicas.json").write_text(text.replace("this boot", "an earlier boot"))
    async with running_node(folder, launcher=FakeLauncher()) as node:
        assert node.supervisor.view().replicas == ()
        assert len(living(process)) == 3
    (folder / "replicas.json").write_text(text)
    async with running_node(folder, launcher=FakeLauncher()) as node:
        await node.supervisor.end_all(0.1)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 1}', '{"format": 1, "boot_id": "this boot", "replicas": [{}]}']
)
async def test_a_broken_list_is_no_list(folder: Path, text: str) -> None:
    (folder / "replicas.json").write_text(text)
    async with running_node(folder, launcher=FakeLauncher()) as node:
        assert node.supervisor.view().replicas == ()


# What a replica says.


async def attach(node: Node, *requests: pb.AttachRequest) -> list[str]:
    """Says these things and returns what kinds of answers came; raises what the call ended with."""
    async with grpc.aio.insecure_channel(node.address) as channel:
        stream = SupervisorServiceStub(channel).Attach(iter(requests), timeout=5)
        try:
            return [str(response.WhichOneof("message")) async for response in stream]
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error


def hello(process: ProcessIdentity, **changes: object) -> pb.AttachRequest:
    replica = types.Replica(replica_id="x", pid=process.pid, state=types.REPLICA_STATE_READY, address="127.0.0.1:21000")
    for name, value in changes.items():
        setattr(replica, name, value)
    return pb.AttachRequest(hello=pb.ReplicaHello(replica=replica, start_ticks=process.start_ticks))


async def test_the_first_message_is_a_hello(folder: Path) -> None:
    async with running_node(folder, launcher=FakeLauncher()) as node:
        with pytest.raises(Exception, match="first message") as caught:
            await attach(node, pb.AttachRequest(ready=pb.ReplicaReady(address="a")))
        assert getattr(caught.value, "reason", "") == "HELLO_EXPECTED"


@pytest.mark.parametrize("lie", ["start time", "session", "supervisor"])
async def test_a_hello_that_proc_does_not_confirm_is_refused_and_nothing_is_killed(
    folder: Path, orphans: list[int], lie: str
) -> None:
    is_leader = lie != "session"
    front = spawn_session("-c", "import time; time.sleep(60)", is_leader=is_leader)
    orphans += [front.pid] if is_leader else []
    own = read_process(os.getpid())
    assert own is not None
    claimed = {
        "start time": ProcessIdentity(front.pid, front.start_ticks + 1),
        "session": front,
        "supervisor": own.identity,
    }[lie]
    async with running_node(folder, launcher=FakeLauncher()) as node:
        with pytest.raises(Exception, match=r"not there|leads a session") as caught:
            await attach(node, hello(claimed))
        assert getattr(caught.value, "reason", "") == "PERMISSION_DENIED"
        assert living(front) == [front.pid]
    kill_and_wait(front)


@pytest.mark.parametrize("changes", [{"address": ""}, {"state": types.REPLICA_STATE_FAILED}])
async def test_an_unknown_replica_that_can_not_be_adopted_is_stopped_and_killed(
    folder: Path, orphans: list[int], changes: dict[str, object]
) -> None:
    front = spawn_session("-c", "import time; time.sleep(60)")
    orphans.append(front.pid)
    async with running_node(folder, launcher=FakeLauncher()) as node:
        assert await attach(node, hello(front, **changes)) == ["stop"]
        async with asyncio.timeout(5):
            while living(front):
                await asyncio.sleep(0.01)
        assert node.supervisor.view().replicas == ()
        await asyncio.sleep(0.05)


async def test_an_ended_replica_that_says_hello_is_stopped(folder: Path, orphans: list[int]) -> None:
    async with running_node(folder, launcher=FakeLauncher()) as node:
        await start_ready(node)
        await node.supervisor.end_all(2)
        front = spawn_session("-c", "import time; time.sleep(60)")
        orphans.append(front.pid)
        assert await attach(node, hello(front, replica_id="r1")) == ["stop"]
        async with asyncio.timeout(5):
            while living(front):
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)


async def test_loads_of_a_replica_are_handed_on(folder: Path) -> None:
    async with running_node(folder, launcher=FakeLauncher()) as node:
        await start_ready(node)
        process = process_of(await node.wait_state("r1", S.READY))
        delta = types.LoadDelta(replica_id="r1", load=types.ReplicaLoad(running_requests=3))
        delta.started.add(request_id="q1")
        foreign = types.LoadDelta(replica_id="other", load=types.ReplicaLoad(running_requests=9))
        with node.supervisor.feed.subscribe(lambda _: None) as (_, outbox):
            said = [hello(process, replica_id="r1"), pb.AttachRequest(load=foreign), pb.AttachRequest(load=delta)]
            assert await attach(node, *said) == ["welcome"]
            reports = [message for message in outbox.take(is_load_due=True) if isinstance(message, LoadReport)]
        assert [(d.replica_id, d.load.running_requests, d.started) for r in reports for d in r.deltas] == [
            ("r1", 3, ("q1",))
        ]
        view = node.replica("r1")
        assert view is not None
        assert view.load.running_requests == 3
        await node.supervisor.end_all(0.1)


async def test_host_memory_beside_a_gpu_is_booked_refused_given_back_and_taken_over(folder: Path) -> None:
    items = (MemoryItem(MemoryKind.KV_OFFLOAD, 3 << 20),)
    weights = FakeWeights()
    async with running_node(folder, launcher=FakeLauncher(), weights=weights, host_memory_bytes=4 << 20) as node:
        assert node.supervisor.execute("one", start_of("r1", host_memory_items=items)).is_accepted
        await node.wait_state("r1", S.READY)
        assert node.supervisor.view().host.booked_bytes == 3 << 20
        booked = node.booked_bytes
        refused = node.supervisor.execute("two", start_of("r2", host_memory_items=items))
        assert (refused.refused_reason, node.booked_bytes) == ("NO_CAPACITY", booked), "and nothing of it stays booked"
        assert "host memory" in refused.message
        assert (
            node.supervisor.execute("stage", Stage("sha256:" + "9" * 64, "m", 2 << 20)).refused_reason == "NO_CAPACITY"
        )
        node.supervisor.write_list()
    async with running_node(folder, launcher=FakeLauncher(), weights=weights, host_memory_bytes=4 << 20) as node:
        assert node.supervisor.view().host.booked_bytes == 3 << 20
        assert await node.supervisor.wait_returned(5.0)
        node.supervisor.execute("drain", Drain("r1", 1.0))
        await node.wait_state("r1", S.STOPPED)
        assert node.supervisor.view().host.booked_bytes == 0
        await node.supervisor.end_all(1)
