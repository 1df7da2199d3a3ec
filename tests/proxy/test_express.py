"""The express lane: who is in it, and that nothing which refuses requests happens to a replica before every Envoy has
taken it out.
"""

import tracemalloc
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helios.proxy import actions
from helios.proxy.admission.keyring import Caller
from helios.proxy.core import Core
from helios.proxy.express.express import LEASE_SECONDS, MAX_SHARED_REPLICAS
from helios.proxy.express.lane import ExpressPolicy, Lane, Place
from helios.proxy.fleet.commands import Command, DrainReplica, SetAdapters, SleepReplica, StopReplica, WakeReplica
from helios.proxy.fleet.state import Load, ReplicaState
from helios.proxy.settings import PeerSettings, ProxySettings
from helios.proxy.traffic import LoadDelta, RoutingPolicy
from tests.proxy.support import GIB, core, entry, hello, policy, replica
from tests.proxy.test_machines import RARELY, CoreMachine

POLICY = ExpressPolicy(model_count=2, per_second=1.0, settle_seconds=2.0, withdraw_seconds=5.0)
ON_ITS_WAY_SECONDS = 0.2
PLACE = Place("r", "m", ("m",), "127.0.0.1:1000", "sha256:1")


def busy_core(express: ExpressPolicy = POLICY, **changes: Any) -> Core:
    """A core with a model that one replica serves and that is asked for."""
    subject = core(replace(policy(), routing=RoutingPolicy(express=express)))
    subject.models_replaced([replace(entry("m", min_replicas=1), **changes)], 0.0, is_synced=True)
    subject.worker_hello(hello(replicas=(replica(),)), 0.0)
    subject.endpoints_acknowledged(subject.fleet.endpoints(), 0.0)
    return subject


def ask(subject: Core, now: float, *, seconds: int = 5) -> float:
    """Has the model asked for, twice a second; returns the time then."""
    for _ in range(seconds):
        now += 1.0
        subject.worker_seen("w", now)
        subject.load_report([LoadDelta("r", Load(), started=(f"a{now}", f"b{now}"))], now)
        subject.load_report([LoadDelta("r", Load(), finished=((f"a{now}", 0), (f"b{now}", 0)))], now)
        subject.tick(now)
    return now


def drains(todo: list[actions.Action]) -> list[str]:
    """Replicas that are told to drain."""
    orders = [action.command.order for action in todo if isinstance(action, actions.Send)]
    return [order.replica_id for order in orders if isinstance(order, DrainReplica)]


def test_a_model_with_one_replica_that_is_asked_for_is_in_the_lane_under_all_of_its_names() -> None:
    subject = busy_core(aliases=("alias", "other@tag"))
    assert not subject.express.lane.places
    ask(subject, 0.0)
    assert {(place.replica_id, place.names) for place in subject.express.lane.places} == {("r", ("m", "alias"))}


def chosen(lane: Lane, rates: dict[str, int], now: float) -> set[str]:
    """A second in which models were asked for so often; returns who is in the lane then."""
    for model, count in rates.items():
        lane.heard(model, count)
    lane.count()
    fit = {model: replace(PLACE, model=model, replica_id=model) for model in lane.asked_for()}
    lane.choose(fit, now)
    return {place.model for place in lane.places}


def test_models_that_are_asked_for_alike_do_not_change_places() -> None:
    lane = Lane(POLICY, has_past=False)
    first = [chosen(lane, {"a": 20, "b": 21, "c": 19}, float(now)) for now in range(10)][-1]
    version = lane.version
    for now in range(10, 40):
        assert chosen(lane, {"a": 20, "b": 21, "c": 30 + now % 5}, float(now)) == first == {"a", "b"}
    assert lane.version == version
    # One that is clearly asked for more has its place.
    assert [chosen(lane, {"a": 20, "b": 21, "c": 80}, float(now)) for now in range(40, 50)][-1] == {"b", "c"}


def test_a_model_that_is_not_asked_for_leaves_the_lane() -> None:
    subject = busy_core()
    now = ask(subject, 0.0)
    assert subject.express.lane.places
    for _ in range(30):
        now += 1.0
        subject.worker_seen("w", now)
        subject.tick(now)
    assert not subject.express.lane.places


@pytest.mark.parametrize(
    "changes",
    [{"canary": "m@123456789abc", "canary_percent": 10}, {"base_model": "other"}, {"is_durable": True}],
    ids=["rollout", "adapter", "durable"],
)
def test_models_whose_requests_differ_are_not_in_the_lane(changes: dict[str, Any]) -> None:
    subject = busy_core(**changes)
    ask(subject, 0.0)
    assert not subject.express.lane.places


@pytest.mark.parametrize(
    "peers",
    [
        {"peers": PeerSettings(lease=True, address="proxy-2.proxies:9000")},
        {"replica_cluster": "replicas-2"},
        {"feed_target": "unix:/run/feed.sock"},
    ],
)
def test_with_several_proxies_the_lane_has_no_places(peers: dict[str, Any]) -> None:
    assert ProxySettings().core_policy().routing.express.model_count
    policy_of_several = ProxySettings(**peers).core_policy().routing.express
    assert not policy_of_several.model_count
    subject = busy_core(replace(POLICY, model_count=policy_of_several.model_count))
    ask(subject, 0.0)
    assert not subject.express.lane.places


def test_where_keys_are_required_nobody_is_in_the_lane() -> None:
    subject = busy_core()
    now = ask(subject, 0.0)
    assert subject.express.lane.places
    subject.keyring.is_required = True
    subject.tick(now)
    assert not subject.express.lane.places


def test_keys_that_nobody_has_to_have_are_no_hindrance() -> None:
    subject = busy_core()
    subject.keyring.replace([(b"hash", Caller("k"))])
    ask(subject, 0.0)
    assert subject.express.lane.places, "Envoy leaves requests with such a key to the picker"


def test_a_second_replica_ends_it() -> None:
    subject = busy_core()
    now = ask(subject, 0.0)
    subject.replica_event("w", 1, replica("second", state=ReplicaState.LOADING), now)
    assert not subject.express.lane.places
    second = replica("second", address="127.0.0.1:1001")
    subject.replica_event("w", 2, second, now)
    subject.endpoints_acknowledged(subject.fleet.endpoints(), now)
    assert not subject.express.lane.places
    ask(subject, now)
    assert subject.express.lane.places == {Place("", "m", ("m",), "", "sha256:1")}, "Envoy picks among both"


def test_a_drain_waits_until_every_envoy_has_taken_the_replica_out() -> None:
    subject = busy_core()
    now = ask(subject, 0.0)
    subject.express_acknowledged(subject.express.lane.version, now)
    assert not drains(subject.drain_model(entry("m"), now))
    assert not subject.traffic.is_candidate("r"), "it is not picked from now on"
    assert not subject.express.lane.places
    assert subject.express.lane.addresses() == {"127.0.0.1:1000"}, "Envoy can still reach it"
    assert drains(subject.express_acknowledged(subject.express.lane.version, now)) == ["r"]
    assert not subject.express.lane.addresses()


def test_an_envoy_that_does_not_answer_holds_a_drain_up_for_a_while_only() -> None:
    subject = busy_core()
    now = ask(subject, 0.0)
    subject.drain_model(entry("m"), now)
    subject.worker_seen("w", now + 4.0)
    assert not drains(subject.tick(now + 4.0))
    subject.worker_seen("w", now + 5.0)
    assert drains(subject.tick(now + 5.0)) == ["r"]


def test_orders_that_refuse_nobody_do_not_wait() -> None:
    lane = Lane(POLICY, has_past=False)
    lane.choose({"m": PLACE}, 0.0)
    lane.choose({"m": PLACE}, 2.0)
    harmless: list[actions.Action] = [
        actions.Send(Command("1", "w", SetAdapters("r", ()))),
        actions.Send(Command("2", "w", StopReplica("other"))),
    ]
    assert lane.keep_back(list(harmless), 3.0) == harmless
    assert lane.keep_back([actions.Send(Command("3", "w", StopReplica("r")))], 3.0) == []


def test_a_wake_does_not_overtake_the_sleep_that_waits() -> None:
    lane = Lane(POLICY, has_past=True)
    sleep: actions.Action = actions.Send(Command("1", "w", SleepReplica("r")))
    wake: actions.Action = actions.Send(Command("2", "w", WakeReplica("r")))
    other: actions.Action = actions.Send(Command("3", "w", WakeReplica("other")))
    assert lane.keep_back([sleep], 0.0) == []
    assert lane.keep_back([wake, other], 0.0) == [other], "it is awake still, and would sleep then"
    assert lane.keep_back([sleep, wake], 0.0) == [], "a hello has both sent again"
    assert lane.acknowledged(lane.version, 0.0) == [sleep, wake]
    assert lane.keep_back([wake], 0.0) == [wake]


def test_a_lane_that_no_envoy_takes_up_takes_no_memory_and_forgets_nobody() -> None:
    lane = Lane(POLICY, has_past=False)
    places = [replace(PLACE, replica_id=f"r{number}") for number in range(2)]
    tracemalloc.start()
    try:
        for number in range(10_000):
            # Busy, and not busy any more.
            place = places[number < 5]
            lane.choose({"m": place}, 10.0 * number)
            lane.choose({"m": place}, 10.0 * number + 5.0)
            lane.leave([place], 10.0 * number + 6.0)
        size_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size_bytes < 200_000
    assert lane.may_get_requests("r1", 0.0), "it was in the first sets"
    lane.acknowledged(lane.version, 0.0)
    assert not lane.may_get_requests("r1", 0.0)
    assert not lane.addresses()


def test_after_a_restart_envoys_may_have_any_replica_in_their_lane() -> None:
    lane = Lane(POLICY, has_past=True)
    order: actions.Action = actions.Send(Command("1", "w", SleepReplica("r")))
    assert lane.keep_back([order], 0.0) == []
    assert lane.has_carried("r")
    assert lane.acknowledged(lane.version, 0.0) == [order]
    assert lane.keep_back([order], 0.0) == [order]


def test_requests_of_the_lane_are_explained() -> None:
    subject = busy_core()
    assert subject.express.pick_of("r") is None
    ask(subject, 0.0)
    pick = subject.express.pick_of("r")
    assert pick is not None
    assert "express lane" in pick.explain()
    assert pick.endpoints == "127.0.0.1:1000"


class LaneMachine(RuleBasedStateMachine):
    """The lane against a plain list of who may still send where, and of what waits for that."""

    WITHDRAW_SECONDS = 3.0

    def __init__(self) -> None:
        super().__init__()
        self.lane = Lane(replace(POLICY, settle_seconds=0.0, withdraw_seconds=self.WITHDRAW_SECONDS), has_past=False)
        self.now = 0.0
        self.next_order = 0
        self.waiting: dict[str, tuple[str, float]] = {}
        self.gone: set[str] = set()
        self.sets: list[tuple[int, frozenset[str]]] = [(0, frozenset())]
        self.leases: dict[str, float] = {}

    def may_send(self, replica_id: str) -> bool:
        in_sets = any(replica_id in held for _, held in self.sets)
        return in_sets or self.now < self.leases.get(replica_id, 0.0)

    def went(self, sends: list[actions.Send]) -> None:
        for send in sends:
            replica_id, since = self.waiting.pop(send.command.command_id)
            assert send.command.command_id not in self.gone, "it went twice"
            self.gone.add(send.command.command_id)
            assert not self.may_send(replica_id) or self.now - since >= self.WITHDRAW_SECONDS

    @rule(places=st.sets(st.sampled_from("abS"), max_size=2))
    def the_lane_changes(self, places: set[str]) -> None:
        fit = {
            model: Place("", model, (model,), "", "")
            if model == "S"
            else replace(PLACE, replica_id=model, model=model, address=model)
            for model in sorted(places)
        }
        before = self.lane.version
        self.lane.choose(fit, self.now)
        if self.lane.version != before:
            self.sets.append((self.lane.version, frozenset(places - {"S"})))

    @rule(replica_ids=st.sets(st.sampled_from("stu"), min_size=1))
    def a_gateway_is_told(self, replica_ids: set[str]) -> None:
        self.lane.leased({replica_id: replica_id for replica_id in replica_ids}, self.now + LEASE_SECONDS)
        self.leases |= dict.fromkeys(replica_ids, self.now + LEASE_SECONDS)

    @precondition(lambda self: self.lane.version)
    @rule(replica_id=st.sampled_from("abstu"), is_sleep=st.booleans())
    def a_replica_is_to_go(self, replica_id: str, is_sleep: bool) -> None:
        self.next_order += 1
        order = SleepReplica(replica_id) if is_sleep else DrainReplica(replica_id, 30.0)
        send = actions.Send(Command(str(self.next_order), "w", order))
        passed = self.lane.keep_back([send, send], self.now)
        if self.may_send(replica_id):
            assert not passed
            self.waiting[send.command.command_id] = (replica_id, self.now)
        else:
            assert passed == [send, send]

    @rule(back=st.integers(0, 3))
    def envoys_acknowledge(self, back: int) -> None:
        version = max(0, self.lane.version - back)
        while len(self.sets) > 1 and self.sets[1][0] <= version:
            self.sets.pop(0)
        self.went(self.lane.acknowledged(version, self.now))

    @rule(seconds=st.sampled_from([0.1, 0.25, 0.5, 1.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        is_late = any(self.now - since >= self.WITHDRAW_SECONDS for _, since in self.waiting.values())
        if is_late:
            del self.sets[:-1]
        self.went(self.lane.expire(self.now))
        for replica_id, since in self.waiting.values():
            assert self.may_send(replica_id), "nobody sends there, and it waits"
            assert self.now - since < self.WITHDRAW_SECONDS

    @invariant()
    def test_who_may_be_sent_to_is_known_and_its_endpoint_stays(self) -> None:
        for replica_id in "abstu":
            assert self.lane.may_get_requests(replica_id, self.now) == self.may_send(replica_id)
            assert replica_id in self.lane.addresses() or not self.may_send(replica_id)
        assert "" not in self.lane.addresses()

    def teardown(self) -> None:
        # And what sums of seconds lack behind the last digit.
        self.now += self.WITHDRAW_SECONDS + 1e-6
        del self.sets[:-1]
        self.went(self.lane.expire(self.now))
        assert not self.waiting, "an order never went"


class ExpressMachine(CoreMachine):
    """The whole proxy with an express lane, an Envoy that takes its state up when it likes, and gateways that pick by
    leases for as long as they may.
    """

    def __init__(self) -> None:
        super().__init__()
        lane = ExpressPolicy(model_count=2, per_second=0.2, settle_seconds=0.0, withdraw_seconds=1e9)
        self.core = core(replace(policy(idle_seconds=50.0, residency_seconds=1.0), routing=RoutingPolicy(express=lane)))
        self.core.models_replaced([entry(name) for name in "abc"], self.now, is_synced=True)
        self.taken: frozenset[Place] = frozenset()
        self.taken_version = 0
        # What gateways go by: until when, and where they may send.
        self.leases: list[tuple[float, dict[str, str]]] = []

    @initialize(is_cold=RARELY)
    def warm(self, is_cold: bool) -> None:
        """A model that has two replicas, on as many workers; they may sleep."""
        if is_cold:
            return
        for worker_id, port in (("x", 901), ("y", 902)):
            one = replica(f"c{worker_id}", model="c", worker_id=worker_id, address=f"127.0.0.1:{port}")
            self.workers[worker_id] = {one.replica_id: replace(one, can_sleep=True, memory_bytes=GIB)}
            self.connect(worker_id, forgets=False)
        self.envoy_acknowledges()
        self.a_model_is_asked_for_by_the_lane(3)
        self.apply(self.core.tick(self.now))
        self.apply(self.core.tick(self.now))
        assert [place.is_shared for place in self.core.express.lane.places] == [True]

    @rule(model=st.sampled_from("abc"), seconds=st.sampled_from([0.0, 5.0, 60.0, 300.0]))
    def request(self, model: str, seconds: float) -> None:
        super().request(model, seconds)
        # One that tries a replica out makes its model unfit, and the next event follows that.
        self.apply(self.core.follow_up(self.now))

    @precondition(lambda self: any(place.is_shared for place in self.core.express.lane.places))
    @rule(seconds=st.sampled_from([0.0, 0.1, 0.4]))
    def a_gateway_asks(self, seconds: float) -> None:
        """The lease counts from when it asked, which was a while before it was answered."""
        for model in "abc":
            view = self.core.express.lease(entry(model), self.now)
            if view is not None:
                found = {one.replica_id: one.address for one in view.candidates if one.room != 0}
                assert all(self.core.traffic.is_candidate(replica_id) for replica_id in found)
                self.leases.append((self.now - seconds + LEASE_SECONDS + ON_ITS_WAY_SECONDS, found))

    @precondition(lambda self: any(place.is_shared for place in self.core.express.lane.places))
    @rule(is_sleep=st.booleans(), seconds=st.sampled_from([0.0, 0.3, 0.6, 0.8]), data=st.data())
    def a_replica_of_a_lease_is_to_go_and_workers_obey(
        self, is_sleep: bool, seconds: float, data: st.DataObject
    ) -> None:
        self.a_gateway_asks(0.0)
        leased = sorted(self.open_leases())
        item = self.core.fleet.replica(data.draw(st.sampled_from(leased))) if leased else None
        if item is not None and self.core.traffic.is_candidate(item.replica_id):
            if is_sleep and self.core.lifecycle.warmth.may_sleep(item):
                self.core.lifecycle.warmth.sleep(item)
            else:
                self.core.lifecycle.drain(item, self.now)
            self.apply(self.core.follow_up(self.now))
        self.now += seconds
        self.apply(self.core.tick(self.now))
        while self.inbox:
            self.obey(refuses=False)

    def open_leases(self) -> dict[str, str]:
        """Replicas that are picked by leases, or were a moment ago: these requests are still on their way."""
        self.leases = [(until, found) for until, found in self.leases if self.now < until]
        return {replica_id: address for _, found in self.leases for replica_id, address in found.items()}

    @rule()
    def envoy_takes_the_lane_up(self) -> None:
        self.taken = self.core.express.lane.places
        self.taken_version = self.core.express.lane.version

    @rule()
    def envoy_acknowledges_the_lane(self) -> None:
        self.apply(self.core.express_acknowledged(self.taken_version, self.now))

    @precondition(lambda self: any(self.workers.values()))
    @rule(count=st.integers(1, 3))
    def a_model_is_asked_for_by_the_lane(self, count: int) -> None:
        for held in self.workers.values():
            for item in held.values():
                started = tuple(f"express {self.next_request} {number}" for number in range(count))
                self.next_request += 1
                ended = tuple((request, 0) for request in started)
                self.apply(self.core.load_report([LoadDelta(item.replica_id, Load(), started, ended)], self.now))

    def carry_out(self, command: Command, *, refuses: bool) -> str:
        match command.order:
            case DrainReplica(replica_id) | SleepReplica(replica_id) | StopReplica(replica_id):
                in_lane = {place.replica_id for place in self.taken}
                assert replica_id not in in_lane, "a replica refuses while Envoy sends to it"
                assert replica_id not in self.open_leases(), "a replica refuses while a gateway may pick it"
            case _:
                pass
        return super().carry_out(command, refuses=refuses)

    @invariant()
    def test_who_is_in_the_lane_is_the_only_one_and_can_be_picked(self) -> None:
        for place in self.core.express.lane.places:
            assert self.core.holds.count(place.model) == 0
            if place.is_shared:
                assert 2 <= len(self.core.fleet.replicas_of(place.model)) <= MAX_SHARED_REPLICAS
                assert self.core.traffic.table.count(place.model, "sha256:1")
                continue
            assert [r.replica_id for r in self.core.fleet.replicas_of(place.model)] == [place.replica_id]
            assert self.core.traffic.is_candidate(place.replica_id)
            assert place.address in self.published

    @invariant()
    def test_an_endpoint_stays_while_envoy_sends_there(self) -> None:
        addresses = self.core.express.lane.addresses()
        assert {place.address for place in self.taken if not place.is_shared} <= addresses
        assert set(self.open_leases().values()) <= addresses
        assert "" not in addresses


TestLane = LaneMachine.TestCase
TestExpress = ExpressMachine.TestCase
TestExpress.settings = settings(max_examples=40, stateful_step_count=40)
