"""Several proxies where things come late, twice, from a newer version or not at all: faults that were, one a test."""

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import pytest

from helios.api.admin.v1 import admin_service_pb2 as pb
from helios.api.admin.v1.admin_service_pb2_grpc import AdminServiceStub
from helios.api.admin.v1.explanation_pb2 import RequestSummary
from helios.api.proxy.v1 import peer_service_pb2 as peer_pb
from helios.mesh.channel import Dialer
from helios.mesh.errors import HeliosError, NotFound, Unavailable
from helios.mesh.requests import StreamRequests
from helios.mesh.tasks import task_scope
from helios.proxy.activation.machine import ActivationState
from helios.proxy.core import STALE_LEADER
from helios.proxy.fleet.commands import Fence
from helios.proxy.peers import calls, forward
from helios.proxy.peers.lease import LeaseKeeper
from helios.proxy.peers.link import PeerLink
from helios.proxy.peers.messages import News, Outlook
from helios.proxy.peers.role import Ask, Role
from helios.proxy.peers.session import FollowerSession
from helios.proxy.peers.wire import news_from_proto
from helios.proxy.runtime import Runtime
from helios.registry.client import Grant, LeaseWish, ToldLease
from tests.proxy.peers_world import TTL_SECONDS, World, settled
from tests.proxy.support import core
from tests.proxy.test_runtime import NoEnvoys, SlowDisk

STARTING = ActivationState.STARTING


# What followers are told.
def starting_for_a_follower() -> tuple[World, Callable[[], None]]:
    """A model starts for a request of p2, which was told so; the other half is what p1 says to it."""
    world = settled()
    world.request("p2", "a", 60)
    world.pass_time(0.25)
    world.deliver("p2")
    world.pass_time(0.25)
    world.deliver("p2")
    assert world.nodes["p2"].core.lifecycle.outlooks.state("a") is STARTING
    session = world.nodes["p2"].session
    assert session is not None

    def speak() -> None:
        told = world.nodes["p1"].core.leadership.news(session.name, world.now)
        world.nodes["p2"].core.leadership.heard(told, world.now)

    return world, speak


def test_a_follower_whose_requests_go_on_first_hears_that_the_start_is_over() -> None:
    world, speak = starting_for_a_follower()
    for machine in world.machines.values():
        world.obey(machine, "p1")
    world.finish_starts()
    for machine in world.machines.values():
        for name in ("p1", "p2"):
            while machine.events[name]:
                world.hear(machine, name)
    assert [error for _, error in world.nodes["p2"].answered] == [None]
    # It holds nothing any more, and says so before the leader looks at what it is to tell.
    leader, follower = (world.nodes[name].core.leadership for name in ("p1", "p2"))
    session = world.nodes["p2"].session
    assert session is not None
    leader.report(session.name, follower.own_report(world.now), world.now)
    world.now += 1.0
    speak()
    assert world.nodes["p2"].core.lifecycle.outlooks.state("a") is ActivationState.IDLE


def test_what_a_leader_said_that_is_gone_does_not_outlast_the_next_one() -> None:
    world, _ = starting_for_a_follower()
    leadership = world.nodes["p2"].core.leadership
    outlooks = world.nodes["p2"].core.lifecycle.outlooks
    leadership.begin_session(world.now)
    assert outlooks.state("a") is STARTING, "with no leader it keeps what it was told last"
    waits = Outlook("b", ActivationState.WAITING, 3.0)
    assert leadership.heard(News(5, 1.0, 0.0, outlooks=(waits,)), world.now)
    assert (outlooks.state("a"), outlooks.state("b")) == (ActivationState.IDLE, ActivationState.WAITING)
    assert leadership.heard(News(5, 2.0, 0.0), world.now)
    assert outlooks.state("b") is ActivationState.WAITING


def test_a_state_that_a_newer_version_sends_is_as_good_as_none() -> None:
    outlook = peer_pb.Outlook(model="a")
    # An enum is open on the wire.
    outlook.MergeFromString(b"\x10\x63")
    assert outlook.state == 99
    (told,) = news_from_proto(peer_pb.News(epoch=1, outlooks=[outlook])).outlooks
    assert told.state is ActivationState.IDLE


# Who leads.
def test_who_heard_a_leader_while_it_asked_does_not_take_the_lead() -> None:
    world = settled()
    node, asked_at = world.nodes["p2"], world.now + 10
    leadership = node.core.leadership
    assert node.role.due(asked_at) is Ask.ACQUIRE
    # It was cut off, and the leader counts on what it promises by this.
    assert leadership.heard(News(1, asked_at, 0.0), asked_at + 0.1)
    assert not node.role.granted(2, asked_at, asked_at + 0.2)
    assert (leadership.leads, leadership.epoch) == (False, 0)
    assert node.role.due(asked_at + 5) is Ask.ACQUIRE
    # Another one was granted the lease after this one, and its answer came first.
    leadership.outdone(4, asked_at + 5)
    assert not node.role.granted(3, asked_at + 5, asked_at + 5.1)
    assert node.role.granted(5, asked_at + 5, asked_at + 5.2)
    assert leadership.leads


@dataclass
class OneLease:
    """Grants a lease with the next epoch, once `may_answer` is set."""

    epoch: int = 0
    may_answer: asyncio.Event = field(default_factory=asyncio.Event)
    released: list[int] = field(default_factory=list)

    async def acquire(self, wish: LeaseWish) -> tuple[bool, ToldLease]:
        self.epoch += 1
        await self.may_answer.wait()
        return True, ToldLease(wish.name, wish.holder, wish.address, self.epoch, TTL_SECONDS)

    async def renew(self, grant: Grant, ttl_seconds: float) -> ToldLease:
        return ToldLease(grant.name, grant.holder, "", grant.epoch, ttl_seconds)

    async def release(self, grant: Grant) -> ToldLease:
        self.released.append(grant.epoch)
        return ToldLease(grant.name, "", "", grant.epoch, 0.0)


@dataclass
class Keeping:
    """A proxy alone with a registry, its keeper not running yet."""

    link: PeerLink
    role: Role
    leases: OneLease
    keeper: LeaseKeeper


@pytest.fixture
def keeping() -> Keeping:
    subject = core()
    subject.leadership.follow(time.monotonic())
    role = Role(subject.leadership, ttl_seconds=TTL_SECONDS)
    link, leases = PeerLink(Runtime(subject, publisher=NoEnvoys(), memory=SlowDisk())), OneLease()
    keeper = LeaseKeeper(link, role, leases, holder="p1", ttl_seconds=TTL_SECONDS)
    keeper.address = "127.0.0.1:1"
    return Keeping(link, role, leases, keeper)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def test_who_waits_for_a_leader_hears_that_a_doubted_one_leads_on(keeping: Keeping) -> None:
    leadership = keeping.link.runtime.core.leadership
    keeping.leases.may_answer.set()
    async with task_scope() as group:
        group.create_task(keeping.keeper.run(), name="keep the lease")
        await until(lambda: leadership.leads)
        leadership.claimed("w1", 9, time.monotonic())
        assert not leadership.leads
        # A request of a key whose limit is reached is not refused before the proxy knows whether it leads.
        assert await keeping.link.wait_told(time.monotonic() + 5)
        assert (leadership.leads, leadership.epoch) == (True, 1)


async def test_a_lease_that_is_granted_to_one_that_stops_is_given_back(keeping: Keeping) -> None:
    async with task_scope() as group:
        group.create_task(keeping.keeper.run(), name="keep the lease")
        await until(lambda: keeping.leases.epoch)
        await keeping.keeper.release()
        keeping.leases.may_answer.set()
        await until(lambda: keeping.leases.released)
        assert keeping.leases.released == [1]
        assert not keeping.link.runtime.core.leadership.leads


async def test_a_session_of_before_tells_nothing_once_its_proxy_leads_and_is_doubted(keeping: Keeping) -> None:
    leadership = keeping.link.runtime.core.leadership
    session = FollowerSession(keeping.link, keeping.role, identity=None, proxy_id="p1", incarnation="1")
    requests = StreamRequests[peer_pb.SessionRequest](max_count=4)
    leadership.lead(2, time.monotonic())
    # Its workers know of a later leader, as where the registry was restored from a copy.
    leadership.claimed("w1", 9, time.monotonic())
    assert (leadership.leads, leadership.following) == (False, None)
    async with asyncio.timeout(5):
        await session._report(requests)


# What workers claim.
def test_claims_of_workers_that_are_gone_are_forgotten() -> None:
    world = settled()
    leadership = world.nodes["p1"].core.leadership
    for number in range(100):
        leadership.claimed(f"gone {number}", 1, world.now)
    for machine in world.machines.values():
        leadership.claims.note(machine.worker_id, 1)
    world.go_well(2)
    assert leadership.claims._epochs == {"w1": 1, "w2": 1}
    leadership.claimed("w1", 9, world.now)
    world.go_well(2)
    assert leadership.claims._ignored_until.keys() == {"w1"}
    world.go_well(62)
    assert not leadership.claims._ignored_until


def test_a_worker_that_refuses_and_claims_nothing_stops_a_leader_once_a_minute_at_most() -> None:
    world = settled()
    subject = world.nodes["p1"].core
    for is_first in (True, False):
        command = subject._commands.issue("w1", Fence())
        subject.command_acknowledged("w1", command.command_id, refused_reason=STALE_LEADER, message="", now=world.now)
        assert subject.leadership.leads is not is_first
        world.go_well(1)
        assert subject.leadership.leads


def test_an_epoch_that_can_not_be_is_no_reason_to_ask() -> None:
    world = settled()
    leadership = world.nodes["p1"].core.leadership
    leadership.claimed("w1", (1 << 64) - 1, world.now)
    assert leadership.leads
    assert leadership.doubted_at is None


# Calls that are passed on.
@dataclass
class Others:
    """Other proxies, by address."""

    leads: bool = True
    known: list[str] = field(default_factory=list)

    def addresses(self) -> list[str]:
        return self.known


class Context:
    """A call that a proxy made which gives up after so long."""

    def __init__(self, remaining: float | None = None) -> None:
        self._remaining = remaining

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return (("x-helios-forwarded", "1"),)

    def time_remaining(self) -> float | None:
        return self._remaining


class Own:
    """An AdminService that knows nothing of anything."""

    async def ExplainRequest(self, request: Any, context: Any) -> Any:
        raise NotFound("not here", reason="REQUEST_NOT_FOUND")

    async def ResetBreaker(self, request: Any, context: Any) -> Any:
        return pb.ResetBreakerResponse()

    async def ListRequests(self, request: Any, context: Any) -> Any:
        return pb.ListRequestsResponse()


class Peers(calls.PeerCalls):
    """Peers of which "dead" can't be reached, "hangs" does not answer, and the others know everything."""

    def __init__(self, others: Others) -> None:
        super().__init__(others, identity=None)
        self.asked: list[str] = []

    async def ask(
        self, address: str, stub_class: Any, name: str, request: Any, context: Any, *, seconds: float = 10.0
    ) -> Any:
        self.asked.append(address)
        if address == "dead":
            raise Unavailable("nobody there")
        if address == "hangs":
            await asyncio.sleep(seconds)
            raise Unavailable("too late")
        if name == "ListRequests":
            return pb.ListRequestsResponse(requests=[RequestSummary(request_id=f"of {address}")])
        return name


@pytest.mark.parametrize("name", ["ExplainRequest", "ListRequests"])
async def test_one_that_hangs_hides_from_nobody_what_others_know(name: str) -> None:
    own: Any = Own()
    peers = Peers(Others(known=["hangs", "dead", "knows"]))
    shared = forward.SharedAdmin(own, peers)
    # Whoever asks on behalf of an operator waits for so long.
    async with asyncio.timeout(0.4):
        answer = await getattr(shared, name)(pb.ListRequestsRequest(), Context(0.4))
    found = answer if name == "ExplainRequest" else [each.request_id for each in answer.requests]
    assert found == ("ExplainRequest" if name == "ExplainRequest" else ["of knows"])


async def test_what_nobody_knows_is_not_found() -> None:
    own: Any = Own()
    shared = forward.SharedAdmin(own, Peers(Others(known=["dead", "dead"])))
    with pytest.raises(NotFound):
        await shared.ExplainRequest(pb.ExplainRequestRequest(), Context())


async def test_a_breaker_is_reset_behind_a_proxy_that_is_dead_which_is_told() -> None:
    own: Any = Own()
    peers = Peers(Others(known=["dead", "b", "c"]))
    with pytest.raises(HeliosError, match="nobody there"):
        await forward.SharedAdmin(own, peers).ResetBreaker(pb.ResetBreakerRequest(), Context())
    assert sorted(peers.asked) == ["b", "c", "dead"]


@pytest.fixture
def open_count(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The addresses of the channels that are open."""
    found: list[str] = []

    class Counted(Dialer):
        async def __aenter__(self) -> Self:
            found.append(self.target)
            return await super().__aenter__()

        async def __aexit__(self, *error: object) -> None:
            found.remove(self.target)
            await super().__aexit__(*error)

    monkeypatch.setattr(calls, "Dialer", Counted)
    monkeypatch.setattr(calls, "_MOST_CHANNELS", 3)
    yield found
    assert not found


async def test_channels_to_proxies_that_are_gone_do_not_pile_up(open_count: list[str]) -> None:
    async with calls.PeerCalls(Others(), identity=None) as peers:
        for number in (1, 2, 1, 3, 4, 1, 5):
            await peers.stub(f"127.0.0.1:{number}", AdminServiceStub)
        assert sorted(open_count) == ["127.0.0.1:1", "127.0.0.1:4", "127.0.0.1:5"]
