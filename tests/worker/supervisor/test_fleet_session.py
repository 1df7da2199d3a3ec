"""The session with a proxy, over real gRPC."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from helios.api.fleet.v1 import fleet_service_pb2 as fleet
from helios.mesh.tasks import task_scope
from helios.worker.replica.kv_losses import Loss, Losses
from helios.worker.replica.settings import Compilation, EngineSettings
from helios.worker.supervisor.commands import Ack, Command, CommandLog, Drain, Start
from helios.worker.supervisor.fleet import FleetFeed
from helios.worker.supervisor.fleet_session import FleetSession, SessionOptions
from helios.worker.supervisor.records import (
    Device,
    DeviceKind,
    DeviceUse,
    Failure,
    FinishedRequest,
    Load,
    LoadDelta,
    Order,
    PhaseTiming,
    ProcessIdentity,
    ReplicaState,
    ReplicaView,
    WorkerView,
)
from helios.worker.supervisor.wire import delta_from_proto, replica_from_proto, replica_to_proto
from tests.worker.supervisor.fakes import FakeProxy, FakeProxySession, serving

OPTIONS = SessionOptions(silence_seconds=5.0, retry_cap_seconds=0.1)
VIEW = ReplicaView(
    order=Order("r1", "m", "sha256:" + "0" * 64, "vllm", 1 << 30, 0, 0, datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)),
    state=ReplicaState.READY,
    address="127.0.0.1:9",
    process=ProcessIdentity(77, 88),
    failure=Failure("BOOM", "it broke"),
    phases=(PhaseTiming("fetch", 1.25),),
    max_context_tokens=512,
    lease_id="lease",
    load=Load(1, 2, 0.5, 3),
)


class FakeWorker:
    """A worker's state without replicas: a feed, and commands that are only noted."""

    def __init__(self, *, outbox_capacity: int = 4096) -> None:
        self.replicas: tuple[ReplicaView, ...] = (VIEW,)
        self.feed = FleetFeed(self._view, outbox_capacity)
        self.carried_out: list[Command] = []
        self._log = CommandLog()

    def execute(self, command_id: str, command: Command) -> Ack:
        return self._log.run(command_id, lambda: self.carried_out.append(command))

    def change(self, replica_id: str, message: str = "it broke") -> None:
        order = replace(VIEW.order, replica_id=replica_id)
        self.feed.publish(replace(VIEW, order=order, failure=Failure("BOOM", message)))

    def _view(self) -> WorkerView:
        device = DeviceUse(Device("cpu:0", DeviceKind.CPU, 8 << 30), 1 << 30)
        return WorkerView("w", "one", "node", "0.1", (device,), ("vllm",), 8, self.replicas)


def session_with(worker: FakeWorker, address: str, options: SessionOptions = OPTIONS) -> FleetSession:
    return FleetSession(address, identity=None, feed=worker.feed, executor=worker, options=options)


@asynccontextmanager
async def in_session(
    worker: FakeWorker, proxy: FakeProxy, options: SessionOptions = OPTIONS
) -> AsyncIterator[FakeProxySession]:
    async with task_scope() as group:
        group.create_task(session_with(worker, proxy.address, options).run())
        yield await proxy.wait_session()


def events(session: FakeProxySession) -> list[tuple[int, str]]:
    found = [r.replica_event for r in session.received if r.WhichOneof("message") == "replica_event"]
    return [(event.sequence, event.replica.replica_id) for event in found]


def finished(request_id: str) -> FinishedRequest:
    return FinishedRequest(request_id, 0, 5, 7, 0.25, 1.5)


async def test_the_hello_says_everything() -> None:
    async with serving(FakeProxy()) as proxy, in_session(FakeWorker(), proxy) as session:
        hello = session.hello
        assert (hello.worker_id, hello.incarnation, hello.node, hello.slot_count) == ("w", "one", "node", 8)
        assert [(d.device_id, d.kind, d.memory_bytes, d.booked_bytes) for d in hello.devices] == [
            ("cpu:0", fleet.DEVICE_KIND_CPU, 8 << 30, 1 << 30)
        ]
        assert list(hello.engines) == ["vllm"]
        assert [replica_from_proto(r, start_ticks=88, lease_id="lease") for r in hello.replicas] == [VIEW]


async def test_events_come_in_order_with_a_sequence_that_grows_by_one() -> None:
    worker = FakeWorker()
    async with serving(FakeProxy()) as proxy, in_session(worker, proxy) as session:
        for number in range(50):
            worker.change(f"r{number}")
        await session.wait_for(lambda: len(events(session)) == 50)
        assert events(session) == [(number + 1, f"r{number}") for number in range(50)]


async def test_a_command_that_comes_twice_is_acked_twice_and_carried_out_once() -> None:
    worker = FakeWorker()
    async with serving(FakeProxy()) as proxy, in_session(worker, proxy) as session:
        command = fleet.Command(command_id="c1", start=fleet.StartReplica(replica_id="r2", model="m", revision="x"))
        drain = fleet.Command(command_id="c2", drain=fleet.DrainReplica(replica_id="r2"))
        unknown = fleet.Command(command_id="c3")
        for sent in (command, command, drain, unknown):
            session.commands.put_nowait(sent)
        await session.wait_for(lambda: session.kinds().count("command_ack") == 4)
        acks = [r.command_ack for r in session.received if r.WhichOneof("message") == "command_ack"]
        assert [(a.command_id, a.refused_reason) for a in acks] == [
            ("c1", ""),
            ("c1", ""),
            ("c2", ""),
            ("c3", "UNKNOWN_COMMAND"),
        ]
        assert worker.carried_out == [Start("r2", "m", "x"), Drain("r2", None)]


async def test_an_idle_worker_sends_heartbeats() -> None:
    async with serving(FakeProxy(interval_seconds=0.02)) as proxy, in_session(FakeWorker(), proxy) as session:
        await session.wait_for(lambda: session.kinds().count("heartbeat") >= 3)


async def test_loads_are_folded_over_the_interval() -> None:
    worker = FakeWorker()
    async with serving(FakeProxy(interval_seconds=0.2)) as proxy, in_session(worker, proxy) as session:
        for number in range(100):
            worker.feed.report(LoadDelta("r1", Load(running_requests=number), started=(f"q{number}",)))
            await asyncio.sleep(0.001)
        await session.wait_for(lambda: requests_started(session) == [f"q{number}" for number in range(100)])
        assert session.kinds().count("load") <= 5


async def test_the_end_of_a_request_is_told_at_once() -> None:
    worker = FakeWorker()
    async with serving(FakeProxy(interval_seconds=5.0)) as proxy, in_session(worker, proxy) as session:
        await asyncio.sleep(0.05)
        sent_at = time.monotonic()
        lost = Losses(3, 1, (Loss("older", 16, 40), Loss("q", 0, 40)))
        worker.feed.report(LoadDelta("r1", Load(), started=("q",), finished=(finished("q"),), losses=lost))
        await session.wait_for(lambda: "load" in session.kinds())
        assert time.monotonic() - sent_at < 1.0
        [report] = [r.load for r in session.received if r.WhichOneof("message") == "load"]
        assert delta_from_proto(report.deltas[0]) == LoadDelta("r1", Load(), ("q",), (finished("q"),), losses=lost)


async def test_a_proxy_that_restarts_gets_a_complete_new_hello() -> None:
    worker = FakeWorker()
    async with task_scope() as group:
        async with serving(FakeProxy()) as proxy:
            group.create_task(session_with(worker, proxy.address).run())
            first = await proxy.wait_session()
            worker.change("r1")
            await first.wait_for(lambda: events(first))
        worker.change("missed")
        worker.replicas = (VIEW, replace(VIEW, order=replace(VIEW.order, replica_id="r2")))
        async with serving(FakeProxy(), proxy.address) as restarted:
            second = await restarted.wait_session()
            assert [replica.replica_id for replica in second.hello.replicas] == ["r1", "r2"]
            worker.change("r3")
            await second.wait_for(lambda: events(second) == [(3, "r3")])


async def test_a_proxy_that_does_not_read_is_given_up_and_resynchronised_and_blocks_nobody() -> None:
    worker = FakeWorker(outbox_capacity=50)
    async with (
        serving(FakeProxy(reads=False)) as deaf,
        serving(FakeProxy()) as good,
        in_session(worker, deaf),
        in_session(worker, good) as session,
    ):
        async with asyncio.timeout(20):
            while len(deaf.sessions) < 2:
                worker.change("large", "x" * 100_000)
                await asyncio.sleep(0.005)
        worker.change("last")
        await session.wait_for(lambda: "last" in [name for _, name in events(session)])
        sequences = [sequence for sequence, _ in events(session)]
        assert sequences == list(range(1, len(sequences) + 1))
        assert len(good.sessions) == 1


async def test_a_proxy_that_is_silent_is_dialled_again() -> None:
    options = SessionOptions(silence_seconds=0.1, retry_cap_seconds=0.1)
    silent = FakeProxy(interval_seconds=0.02, is_silent=True)
    async with serving(silent) as proxy, in_session(FakeWorker(), proxy, options):
        await proxy.wait_session(3)


async def test_a_proxy_that_is_away_is_dialled_until_it_comes() -> None:
    worker = FakeWorker()
    proxy = FakeProxy()
    async with serving(FakeProxy()) as other:
        proxy.address = other.address
    async with task_scope() as group:
        group.create_task(session_with(worker, proxy.address).run())
        await asyncio.sleep(0.2)
        async with serving(proxy, proxy.address):
            assert (await proxy.wait_session()).hello.worker_id == "w"


@pytest.mark.parametrize("state", list(ReplicaState))
def test_a_replica_survives_the_wire_in_every_state(state: ReplicaState) -> None:
    view = replace(VIEW, state=state)
    assert replica_from_proto(replica_to_proto(view), start_ticks=88, lease_id="lease") == view


def test_the_form_of_a_replica_and_that_it_came_in_the_background_survive_the_wire() -> None:
    order = replace(VIEW.order, settings=EngineSettings(compilation=Compilation.COMPILED), is_background=True)
    view = replace(VIEW, order=order)
    assert replica_from_proto(replica_to_proto(view), start_ticks=88, lease_id="lease") == view


def requests_started(session: FakeProxySession) -> list[str]:
    reports = [r.load for r in session.received if r.WhichOneof("message") == "load"]
    return [started.request_id for report in reports for delta in report.deltas for started in delta.started]
