"""Sessions with several proxies: each is told everything, none waits for another, and only the leader is obeyed."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from helios.api.fleet.v1 import fleet_service_pb2 as fleet
from helios.mesh.errors import InvalidRequest
from helios.mesh.tasks import task_scope
from helios.worker.supervisor.commands import Drain
from helios.worker.supervisor.fence import Fence
from helios.worker.supervisor.fleet_session import FleetSession
from helios.worker.supervisor.proxy_sessions import MAX_PROXIES, ProxySessions, resolve_name
from helios.worker.supervisor.records import Load, LoadDelta
from tests.worker.supervisor.fakes import FakeProxy, FakeProxySession, serving
from tests.worker.supervisor.test_fleet_session import OPTIONS, FakeWorker, events, finished

WAIT_SECONDS = 20.0


class NamedSession:
    """A session that does nothing; whether it is open is the test's to say."""

    def __init__(self) -> None:
        self.is_open = False
        self.is_running = False

    async def run(self) -> None:
        self.is_running = True
        try:
            await asyncio.Event().wait()
        finally:
            self.is_running = False


class Names:
    """A resolver whose answer is the test's to say."""

    def __init__(self, *addresses: str) -> None:
        self.addresses: frozenset[str] | None = frozenset(addresses)
        self.asked = 0

    async def resolve(self, host: str, port: int) -> frozenset[str]:
        if host == "nowhere":
            raise OSError("no such name")
        assert (host, port) == ("proxies", 9000)
        self.asked += 1
        if self.addresses is None:
            raise OSError("no such name")
        return self.addresses

    async def wait_asked(self) -> None:
        """Waits until what was resolved from now on has been acted upon."""
        enough = self.asked + 2
        async with asyncio.timeout(WAIT_SECONDS):
            while self.asked < enough:
                await asyncio.sleep(0.005)


@asynccontextmanager
async def named(names: Names, *targets: str) -> AsyncIterator[tuple[ProxySessions, dict[str, NamedSession]]]:
    opened: dict[str, NamedSession] = {}

    def open_session(address: str) -> NamedSession:
        opened[address] = NamedSession()
        return opened[address]

    sessions = ProxySessions(targets, open_session, resolve_seconds=0.01, resolve=names.resolve)
    async with task_scope() as group:
        group.create_task(sessions.run())
        await names.wait_asked()
        yield sessions, opened


async def test_a_name_is_resolved_again_and_again() -> None:
    names = Names("10.0.0.1:9000")
    async with named(names, "dns:proxies:9000", "unix:/control") as (sessions, opened):
        assert sessions.addresses == {"10.0.0.1:9000", "unix:/control"}
        names.addresses = frozenset({"10.0.0.2:9000"})
        await names.wait_asked()
        assert sessions.addresses == {"10.0.0.2:9000", "unix:/control"}
        assert not opened["10.0.0.1:9000"].is_running
        assert opened["10.0.0.2:9000"].is_running


async def test_a_session_that_works_outlives_its_name() -> None:
    names = Names("10.0.0.1:9000")
    async with named(names, "dns:proxies:9000") as (sessions, opened):
        opened["10.0.0.1:9000"].is_open = True
        for said in (None, frozenset[str]()):
            names.addresses = said
            await names.wait_asked()
            assert sessions.addresses == {"10.0.0.1:9000"}
        opened["10.0.0.1:9000"].is_open = False
        await names.wait_asked()
        assert sessions.addresses == set()


async def test_a_name_that_is_none_keeps_nobody_from_the_others() -> None:
    names = Names("10.0.0.1:9000")
    async with named(names, "dns:nowhere:9000", "dns:proxies:9000") as (sessions, _):
        assert sessions.addresses == {"10.0.0.1:9000"}
        names.addresses = frozenset({"10.0.0.2:9000"})
        await names.wait_asked()
        # There is no telling what the other name stands for.
        assert sessions.addresses == {"10.0.0.1:9000", "10.0.0.2:9000"}


async def test_proxies_are_bounded() -> None:
    names = Names(*(f"10.0.0.{number}:9000" for number in range(MAX_PROXIES + 9)))
    async with named(names, "dns:proxies:9000") as (sessions, _):
        assert len(sessions.addresses) == MAX_PROXIES


async def test_a_name_of_this_machine_is_resolved() -> None:
    assert await resolve_name("127.0.0.1", 9000) == {"127.0.0.1:9000"}
    assert await resolve_name("::1", 9000) == {"[::1]:9000"}


@pytest.mark.parametrize("target", ["dns:proxies", "dns::9000", "dns:proxies:http", "dns:proxies:0"])
def test_a_name_needs_a_port(target: str) -> None:
    with pytest.raises(InvalidRequest):
        ProxySessions([target], lambda _: NamedSession(), resolve_seconds=1.0)


@asynccontextmanager
async def two_proxies(worker: FakeWorker, fence: Fence) -> AsyncIterator[tuple[FakeProxy, FakeProxy]]:
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(serving(FakeProxy()))
        two = await stack.enter_async_context(serving(FakeProxy()))

        def open_session(address: str) -> FleetSession:
            return FleetSession(address, identity=None, feed=worker.feed, executor=worker, fence=fence, options=OPTIONS)

        sessions = ProxySessions([one.address, two.address], open_session, resolve_seconds=1.0)
        group = await stack.enter_async_context(task_scope())
        group.create_task(sessions.run())
        yield one, two


def drain(command_id: str, epoch: int) -> fleet.Command:
    return fleet.Command(command_id=command_id, drain=fleet.DrainReplica(replica_id="r1"), epoch=epoch)


async def ack_of(session: FakeProxySession, command: fleet.Command) -> fleet.CommandAck:
    """Sends a command and waits for what the worker makes of it."""
    before = session.kinds().count("command_ack")
    session.commands.put_nowait(command)
    await session.wait_for(lambda: session.kinds().count("command_ack") > before)
    acks = [request.command_ack for request in session.received if request.WhichOneof("message") == "command_ack"]
    assert acks[-1].command_id == command.command_id
    return acks[-1]


async def heard_load(session: FakeProxySession) -> None:
    await session.wait_for(lambda: "load" in session.kinds())


async def test_each_proxy_is_told_everything() -> None:
    worker = FakeWorker()
    async with two_proxies(worker, Fence()) as (one, two):
        sessions = [await one.wait_session(), await two.wait_session()]
        worker.change("r2")
        worker.feed.report(LoadDelta("r1", Load(0, 0, 0.0, 7), started=("q",), finished=(finished("q"),)))
        for session in sessions:
            await heard_load(session)
            report = next(request.load for request in session.received if request.WhichOneof("message") == "load")
            assert [end.request_id for end in report.deltas[0].finished] == ["q"]
            assert events(session) == [(1, "r2")]


async def test_a_leader_of_the_past_is_refused_and_told_of_the_new_one() -> None:
    worker, fence = FakeWorker(), Fence()
    async with two_proxies(worker, fence) as (one, two):
        first, second = await one.wait_session(), await two.wait_session()
        assert (await ack_of(first, drain("c1", 4))).refused_reason == ""
        assert (await ack_of(second, drain("c2", 5))).refused_reason == ""
        refused = await ack_of(first, drain("c3", 4))
        assert (refused.refused_reason, refused.epoch) == ("STALE_LEADER", 5)
        assert worker.carried_out == [Drain("r1"), Drain("r1")]
        # What was refused for its epoch was not answered for good.
        assert (await ack_of(first, drain("c3", 6))).refused_reason == ""
        assert len(worker.carried_out) == 3


async def test_a_fence_does_nothing_but_shut_out_those_before() -> None:
    worker = FakeWorker()
    async with two_proxies(worker, Fence()) as (one, two):
        first, second = await one.wait_session(), await two.wait_session()
        fence = fleet.Command(command_id="c1", fence=fleet.Fence(), epoch=5)
        assert (await ack_of(second, fence)).refused_reason == ""
        assert (await ack_of(first, drain("c2", 4))).refused_reason == "STALE_LEADER"
        assert worker.carried_out == []


async def test_a_leader_is_heard_of_before_its_first_command() -> None:
    worker, fence = FakeWorker(), Fence(9)
    async with two_proxies(worker, fence) as (one, two):
        first, _ = await one.wait_session(), await two.wait_session()
        assert first.hello.epoch == 9
        two.epoch = 10
        async with asyncio.timeout(WAIT_SECONDS):
            while fence.leader() != two.address:
                await asyncio.sleep(0.005)
        for epoch in (9, 0):
            assert (await ack_of(first, drain(f"c{epoch}", epoch))).refused_reason == "STALE_LEADER"
        assert worker.carried_out == []


async def test_a_proxy_that_hangs_holds_up_no_other() -> None:
    worker = FakeWorker()
    async with serving(FakeProxy(is_silent=True, reads=False)) as hanging:
        fence = Fence()

        def open_session(address: str) -> FleetSession:
            return FleetSession(address, identity=None, feed=worker.feed, executor=worker, fence=fence, options=OPTIONS)

        async with serving(FakeProxy()) as other, task_scope() as group:
            sessions = ProxySessions([hanging.address, other.address], open_session, resolve_seconds=1.0)
            group.create_task(sessions.run())
            await hanging.wait_session()
            session = await other.wait_session()
            for number in range(200):
                worker.change(f"r{number}")
            assert (await ack_of(session, drain("c1", 0))).refused_reason == ""
            await session.wait_for(lambda: len(events(session)) == 200)
