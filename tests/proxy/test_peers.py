"""Several proxies as cores: one leads, none loses a request, and a key's limit holds for all of them together."""

import time

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from pydantic import ValidationError

from helios.mesh.errors import HeliosError, NoReadyReplica, QuotaExceeded
from helios.proxy.activation.machine import ActivationState
from helios.proxy.admission.keyring import Caller
from helios.proxy.core import STALE_LEADER, Core
from helios.proxy.fleet.wire import command_to_proto
from helios.proxy.peers import wire
from helios.proxy.peers.escrow import VALID_SECONDS
from helios.proxy.peers.link import PeerLink
from helios.proxy.peers.messages import (
    Failure,
    Granted,
    News,
    Outlook,
    Report,
    SliceGrant,
    SliceKey,
    SliceReport,
    Spent,
)
from helios.proxy.peers.role import Role
from helios.proxy.peers.session import FollowerSession
from helios.proxy.runtime import Runtime
from helios.proxy.settings import PeerSettings, ProxySettings
from tests.proxy.peers_world import KEY, Machine, World, leader_of, settled
from tests.proxy.support import core, entry
from tests.proxy.test_runtime import NoEnvoys, SlowDisk

RARELY = st.sampled_from([True, False, False, False])


def follower_of(world: World) -> str:
    return next(name for name in world.nodes if name != leader_of(world))


def test_one_leads_and_the_others_follow() -> None:
    world = settled(3)
    assert world.leaders() == ["p1"]
    assert [node.session is not None for node in world.nodes.values()] == [False, True, True]


def test_what_waits_at_a_follower_is_started_once_and_released_there() -> None:
    world = settled()
    assert not world.request("p2", "a", 60)
    assert not world.request("p1", "a", 60)
    world.go_well(2)
    assert [error for node in world.nodes.values() for _, error in node.answered] == [None, None]
    assert sum(len(machine.replicas) for machine in world.machines.values()) == 1


def test_a_failed_start_answers_those_who_wait_at_a_follower() -> None:
    world = settled()
    world.request("p2", "a", 60)
    world.go_well(2, fails=True)
    ((_, error),) = world.nodes["p2"].answered
    assert isinstance(error, NoReadyReplica)
    assert error.metadata["cause"] == "ENGINE_DIED"
    assert world.nodes["p2"].core.lifecycle.failure("a")
    assert world.nodes["p1"].core.holds.count("a") == 0


def test_a_follower_tells_the_leader_s_estimate() -> None:
    world = settled()
    world.request("p1", "a", 60)
    world.go_well(3)
    world.nodes["p1"].core.lifecycle.estimates.believe("b", 40.0)
    world.request("p2", "b", 1)
    for _ in range(6):
        world.pass_time(0.25)
        world.deliver("p2")
    ((_, error),) = world.nodes["p2"].answered
    assert error is not None
    assert error.retry_after_seconds == pytest.approx(39, abs=1.5)


def served_by_a_follower() -> World:
    """A request went to a replica by way of a follower, which has not said so yet."""
    world = settled()
    world.request("p2", "a", 60)
    world.go_well(2)
    assert world.request("p2", "a", 60)
    return world


def replicas_of(world: World, model: str) -> list[str]:
    return [
        one.replica_id for machine in world.machines.values() for one in machine.replicas.values() if one.model == model
    ]


def test_a_model_at_zero_stays_there_whatever_a_follower_tells_of_its_use_before() -> None:
    world = served_by_a_follower()
    assert replicas_of(world, "a")
    world.apply("p1", world.nodes["p1"].core.drain_model(entry("a"), world.now))
    world.go_well(5)
    assert replicas_of(world, "a") == []


def test_a_model_at_zero_stays_there_under_the_next_leader() -> None:
    world = served_by_a_follower()
    world.go_well(1)
    world.apply("p1", world.nodes["p1"].core.drain_model(entry("a"), world.now))
    # It is told of what goes, and still there when the leader dies.
    world.pass_time(0.25)
    world.deliver("p2")
    world.kill("p1")
    world.go_well(12)
    assert (world.leaders(), replicas_of(world, "a")) == (["p2"], [])


def test_a_model_at_zero_comes_back_with_the_next_request_of_a_follower() -> None:
    world = served_by_a_follower()
    world.apply("p1", world.nodes["p1"].core.drain_model(entry("a"), world.now))
    world.go_well(1)
    assert not world.request("p2", "a", 60)
    world.go_well(2)
    assert world.request("p2", "a", 60)
    world.go_well(5)
    assert replicas_of(world, "a")


def test_what_a_follower_used_long_after_a_model_was_let_go_counts() -> None:
    traffic = core().traffic
    traffic.used("a", 10.0)
    traffic.forget_use("a", 11.0)
    traffic.used("a", 10.9)
    assert (traffic.last_used_at("a"), traffic.forgotten()) == (None, {"a": 11.0})
    traffic.used("a", 12.0)
    assert (traffic.last_used_at("a"), traffic.forgotten()) == (12.0, {})
    traffic.told_forgotten("a", 11.0)
    assert traffic.last_used_at("a") == 12.0


def test_the_next_leader_takes_over_a_start_in_flight() -> None:
    world = settled()
    world.request("p2", "a", 60)
    world.pass_time(0.1)
    world.deliver("p2")
    world.pass_time(0.1)
    for machine in world.machines.values():
        world.obey(machine, "p1")
    assert len(world.starting("a")) == 1
    world.kill("p1")
    for _ in range(40):
        world.pass_time(0.25)
        for machine in world.machines.values():
            while machine.commands["p2"]:
                world.obey(machine, "p2")
            while machine.events["p2"]:
                world.hear(machine, "p2")
    assert world.leaders() == ["p2"]
    assert len(world.starting("a")) == 1
    world.go_well(2)
    assert [error for _, error in world.nodes["p2"].answered] == [None]


def test_what_waits_at_a_follower_waits_for_the_next_leader() -> None:
    world = settled(3)
    world.kill("p1")
    world.request("p3", "a", 60)
    world.go_well(12)
    assert len(world.leaders()) == 1
    assert [error for _, error in world.nodes["p3"].answered] == [None]


def test_an_outage_of_the_registry_moves_no_lead() -> None:
    world = settled(3)
    world.cut |= {frozenset((name, "registry")) for name in world.nodes}
    world.go_well(30)
    assert world.leaders() == ["p1"]
    assert world.spend("p1", 100)
    world.request("p2", "a", 60)
    world.go_well(2)
    assert [error for _, error in world.nodes["p2"].answered] == [None]


def test_a_leader_that_was_replaced_orders_nothing_and_follows() -> None:
    world = settled()
    world.cut |= {frozenset(("p1", "registry")), frozenset(("p1", "p2"))}
    world.go_well(20)
    world.request("p1", "a", 60)
    world.go_well(3)
    assert world.leaders() == ["p2"]
    world.cut.clear()
    world.go_well(3)
    assert [error for _, error in world.nodes["p1"].answered] == [None]
    assert sum(len(machine.replicas) for machine in world.machines.values()) == 1


def test_a_follower_keeps_its_promise_over_a_broken_session() -> None:
    world = settled()
    world.cut |= {frozenset(("p1", "registry")), frozenset(("p1", "p2"))}
    world.lease.until = world.now
    # It dials anew, and nobody answers.
    world.break_session("p2")
    world.nodes["p2"].core.leadership.begin_session(world.now)
    world.pass_time(VALID_SECONDS - 1)
    assert world.leaders() == ["p1"]
    world.go_well(4)
    assert "p2" in world.leaders()
    # What it had promised is over for the old leader, too, before another one leads.
    assert not world.spend("p1", 10)


def spend_all(world: World, name: str, seconds: float) -> int:
    """A follower is asked for as much as it can get; returns how much that was."""
    count = 0
    for _ in range(round(seconds * 4)):
        while world.spend(name, 10):
            world.settle(1.0)
            count += 10
        world.go_well(0.25)
    return count


def test_a_follower_with_all_of_the_demand_gets_nearly_all_of_the_limit() -> None:
    world = settled()
    assert spend_all(world, "p2", 60) >= 0.9 * 2 * KEY.tokens_per_minute
    assert world.most_in_a_window() <= 1e-3


def test_what_one_proxy_does_not_use_another_one_gets() -> None:
    world = settled(3)
    spend_all(world, "p2", 5)
    world.go_well(60)
    assert spend_all(world, "p3", 6) >= 0.9 * KEY.tokens_per_minute


def test_a_key_that_is_rarely_used_at_a_follower_has_one_limit() -> None:
    world = settled()
    for _ in range(12):
        assert spend_all(world, "p2", 1.5)
        for _ in range(30):
            world.pass_time(2)
            world.deliver("p2")
            world.deliver("p2")
    while world.spend("p1", 10):
        world.settle(1.0)
    spend_all(world, "p2", 3)
    assert world.most_in_a_window() <= 1e-3


def test_a_request_too_large_for_what_is_left_is_refused_until_it_fits() -> None:
    world = settled()
    spend_all(world, "p2", 8)
    assert not world.spend("p2", 300)
    world.go_well(0.5)
    assert not world.spend("p2", 300)
    assert world.nodes["p2"].core.leadership.following is not None
    assert world.nodes["p2"].core.leadership.following.slices.is_refused(KEY.key_id)
    # Nothing is kept for what nobody asks for any more.
    world.go_well(40)
    world.spend("p2", 300)
    world.go_well(0.5)
    assert world.spend("p2", 300)


def test_what_proxies_say_survives_the_wire() -> None:
    key = SliceKey("key", 60, 6000, 3)
    report = Report(
        12.5,
        11.0,
        held=(("a", 3), ("b", 0)),
        used=(("a", 0.25),),
        wished=("c",),
        slices=(SliceReport(key, Spent(5, 4, 3, 2), Spent(8, 7, 6, 5)),),
    )
    news = News(
        7,
        100.0,
        99.5,
        draining=("r1",),
        outlooks=(Outlook("a", ActivationState.STARTING, 4.5, "why"),),
        failures=(Failure("a", "NO_CAPACITY", "no room", 2.0),),
        estimates=(("a", 3.5),),
        slices=(SliceGrant(key, Granted(9, 8, 7.5, 6.5, is_reclaimed=True), Granted()),),
        forgotten=(("b", 2.5),),
    )
    quiet = News(7, 1.0, 0.0)
    assert wire.report_from_proto(wire.report_to_proto(report)) == report
    assert [wire.news_from_proto(wire.news_to_proto(one)) for one in (news, quiet)] == [news, quiet]
    assert (news.has_content, quiet.has_content) == (True, False)


def ordered(world: World) -> Machine:
    """The worker that the one proxy has ordered something of, and that has not taken it yet."""
    (machine,) = [machine for machine in world.machines.values() if machine.commands["p1"]]
    return machine


def test_an_order_is_sent_in_the_epoch_in_which_it_was_given() -> None:
    world = settled()
    world.request("p1", "a", 60)
    ((_, command),) = ordered(world).commands["p1"]
    leadership = world.nodes["p1"].core.leadership
    leadership.follow(world.now)
    assert command_to_proto(command).command.epoch == 1
    leadership.lead(3, world.now)
    assert command_to_proto(command).command.epoch == 1


def test_a_refusal_of_an_order_from_before_ends_no_lead() -> None:
    world = settled()
    world.request("p1", "a", 60)
    machine, subject = ordered(world), world.nodes["p1"].core
    ((_, command),) = machine.commands["p1"]
    subject.leadership.lead(3, world.now)
    subject.command_acknowledged(
        machine.worker_id, command.command_id, refused_reason=STALE_LEADER, message="", now=world.now
    )
    assert subject.leadership.epoch == 3


def test_what_a_worker_has_not_answered_comes_again_as_an_order_of_now() -> None:
    world = settled()
    world.request("p1", "a", 60)
    machine = ordered(world)
    world.nodes["p1"].core.leadership.lead(2, world.now)
    world.dial("p1", machine)
    assert {command_to_proto(command).command.epoch for _, command in machine.commands["p1"]} == {2}


def test_a_worker_that_is_back_before_the_first_order_is_waited_for() -> None:
    world = settled(1)
    subject = world.nodes["p1"].core
    subject.worker_lost("w1", world.now)
    subject.leadership.lead(2, world.now)
    world.dial("p1", world.machines["w1"])
    subject.leadership.fenced("w2", world.now)
    assert not subject.lifecycle.is_open
    subject.leadership.fenced("w1", world.now)
    assert subject.lifecycle.is_open


def test_a_leader_that_missed_another_one_s_time_begins_with_limits_used_up() -> None:
    world = settled()
    leadership = world.nodes["p1"].core.leadership
    leadership.lead(2, world.now)
    assert len(leadership.followers) == 1
    assert world.spend("p1", 100)
    leadership.lead(4, world.now)
    assert len(leadership.followers) == 0, "what they were granted is of buckets that are gone"
    assert not world.spend("p1", 100)


def test_a_follower_that_knows_other_limits_of_a_key_has_nothing_counted_anew() -> None:
    world = settled()
    now, older = Caller("changed", requests_per_minute=2), Caller("changed", requests_per_minute=3)
    leader, follower = world.nodes["p1"].core, world.nodes["p2"].core
    leader.keyring.replace([(b"", now)])
    follower.keyring.replace([(b"", older)])
    for number in range(2):
        admit(leader, now, f"{number}", world.now)
    for _ in range(3):
        with pytest.raises(HeliosError):
            admit(follower, older, "elsewhere", world.now)
        world.go_well(0.5)
        with pytest.raises(QuotaExceeded):
            admit(leader, now, "here", world.now)


def test_a_limit_that_is_none_any_more_holds_no_follower_up() -> None:
    world = settled()
    older = Caller("changed", requests_per_minute=3)
    leader, follower = world.nodes["p1"].core, world.nodes["p2"].core
    leader.keyring.replace([(b"", Caller("changed"))])
    with pytest.raises(HeliosError):
        admit(follower, older, "1", world.now)
    world.go_well(0.5)
    admit(follower, older, "1", world.now)


def admit(subject: Core, caller: Caller, request_id: str, now: float) -> None:
    """A request of a key comes to a proxy. Raises HeliosError where it is not let in."""
    subject.traffic.quotas.admit(caller, request_id, "a", body_bytes=0, max_tokens=1, now=now)


def test_what_a_leader_before_says_is_not_heard() -> None:
    world = settled()
    leadership = world.nodes["p2"].core.leadership
    assert leadership.heard(News(1, world.now, 0.0), world.now)
    leadership.outdone(2, world.now)
    assert not leadership.heard(News(1, world.now, 0.0), world.now)


async def test_who_waits_for_a_leader_in_vain_leaves_nothing() -> None:
    link = PeerLink(Runtime(core(), publisher=NoEnvoys(), memory=SlowDisk()))
    assert not await link.wait_told(time.monotonic())
    assert not link._told


class Enough(Exception):
    """There is nothing to do but to wait."""


class IdleLink(PeerLink):
    """A link that says when somebody waits."""

    async def happened(self) -> None:
        raise Enough


async def test_who_leaves_begins_no_session_again() -> None:
    subject = core()
    role = Role(subject.leadership, ttl_seconds=6.0)
    subject.leadership.follow(0.0)
    role.leader_address = "127.0.0.1:1"
    link = IdleLink(Runtime(subject, publisher=NoEnvoys(), memory=SlowDisk()))
    session = FollowerSession(link, role, identity=None, proxy_id="p2", incarnation="1")
    session.leave()
    with pytest.raises(Enough):
        await session.run()


@pytest.mark.parametrize("listen", ["0.0.0.0:9000", "[::]:9000"])
def test_one_of_several_says_where_it_is_reached(listen: str) -> None:
    peers = PeerSettings(lease=True)
    with pytest.raises(ValidationError, match=r"peers\.address"):
        ProxySettings(control_listen=listen, peers=peers)
    ProxySettings(control_listen=listen)
    for reached in ("unix:/run/control.sock", "127.0.0.1:0", "10.0.0.7:9000"):
        ProxySettings(control_listen=reached, peers=peers)
    ProxySettings(control_listen=listen, peers=PeerSettings(lease=True, address="proxy-2.proxies:9000"))


class PeersMachine(RuleBasedStateMachine):
    """Three proxies, two workers and a registry, with everything late, cut or dead at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(3)

    @initialize()
    def begin(self) -> None:
        self.world.go_well(2)

    @rule(data=st.data(), model=st.sampled_from("ab"), seconds=st.sampled_from([1.0, 20.0, 300.0]))
    def request(self, data: st.DataObject, model: str, seconds: float) -> None:
        self.world.request(self.any_proxy(data), model, seconds)

    @rule(data=st.data(), tokens=st.integers(1, 300))
    def spend(self, data: st.DataObject, tokens: int) -> None:
        self.world.spend(self.any_proxy(data), tokens)

    @rule(data=st.data())
    def spend_all(self, data: st.DataObject) -> None:
        name = self.any_proxy(data)
        while self.world.spend(name, 37):
            pass

    @rule(share=st.floats(0, 1))
    def settle(self, share: float) -> None:
        self.world.settle(share)

    @rule(model=st.sampled_from("ab"))
    def a_model_is_scaled_to_zero(self, model: str) -> None:
        for name in self.world.leaders():
            self.world.apply(name, self.world.nodes[name].core.drain_model(entry(model), self.world.now))

    @rule(data=st.data(), epoch=st.integers(1, 30))
    def a_worker_lies(self, data: st.DataObject, epoch: int) -> None:
        subject = self.world.nodes[self.any_proxy(data)].core
        subject.leadership.claimed(self.any_machine(data).worker_id, epoch, self.world.now)

    @rule(data=st.data())
    def a_worker_obeys(self, data: st.DataObject) -> None:
        self.world.obey(self.any_machine(data), self.any_proxy(data))

    @rule(data=st.data())
    def a_proxy_hears_a_worker(self, data: st.DataObject) -> None:
        self.world.hear(self.any_machine(data), self.any_proxy(data))

    @rule(data=st.data())
    def a_session_delivers(self, data: st.DataObject) -> None:
        self.world.deliver(self.any_proxy(data))

    @rule(data=st.data())
    def a_session_breaks(self, data: st.DataObject) -> None:
        self.world.break_session(self.any_proxy(data))

    @rule(fails=RARELY)
    def starts_end(self, fails: bool) -> None:
        self.world.finish_starts(fails=fails)

    @rule(seconds=st.sampled_from([0.05, 0.5, 1.0, 2.5]))
    def time_passes(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @rule(data=st.data(), other=st.sampled_from(["p1", "p2", "p3", "registry"]))
    def a_link_is_cut(self, data: st.DataObject, other: str) -> None:
        name = self.any_proxy(data)
        if name != other:
            self.world.cut.add(frozenset((name, other)))

    @rule()
    def links_heal(self) -> None:
        self.world.cut.clear()

    @rule(data=st.data(), happens=RARELY)
    def a_proxy_is_killed(self, data: st.DataObject, happens: bool) -> None:
        if happens and len(self.world.nodes) > 1:
            self.world.kill(self.any_proxy(data))

    @rule()
    def a_proxy_comes_back(self) -> None:
        for name in ("p1", "p2", "p3"):
            if name not in self.world.nodes:
                self.world.start_proxy(name)
                return

    @rule(seconds=st.sampled_from([1.0, 12.0]))
    def all_goes_well_for_a_while(self, seconds: float) -> None:
        self.world.go_well(seconds)

    @rule()
    def test_in_the_end_one_leads_and_everybody_is_answered(self) -> None:
        self.world.cut.clear()
        self.world.go_well(25)
        assert len(self.world.leaders()) == 1
        for node in self.world.nodes.values():
            assert node.waiting == {}
            assert node.core.leadership.leads or node.session is not None

    @invariant()
    def test_every_hold_is_accounted_for(self) -> None:
        for node in self.world.nodes.values():
            assert sum(node.core.holds.own_counts().values()) == len(node.waiting)
            for _, error in node.answered:
                assert error is None or error.retry_after_seconds

    @invariant()
    def test_a_model_has_at_most_one_start_under_way(self) -> None:
        for model in "ab":
            assert len(self.world.starting(model)) <= 1

    @invariant()
    def test_all_proxies_together_let_in_no_more_than_the_limit(self) -> None:
        assert self.world.most_in_a_window() <= 1e-3

    def any_proxy(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.world.nodes)))

    def any_machine(self, data: st.DataObject):  # type: ignore[no-untyped-def]
        return self.world.machines[data.draw(st.sampled_from(sorted(self.world.machines)))]


class LongPeersMachine(PeersMachine):
    """The same, many more times."""


TestPeers = PeersMachine.TestCase
TestPeers.settings = hypothesis_settings(max_examples=25, stateful_step_count=40, deadline=None)
TestPeersForLong = pytest.mark.soak(LongPeersMachine.TestCase)
TestPeersForLong.settings = hypothesis_settings(max_examples=2000, stateful_step_count=80, deadline=None)
