"""How Envoy is told to pick among several replicas: exactly as the picker picks, and only while that is enough."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.mesh.routing import Choice, ModelRouting
from helios.proxy import actions
from helios.proxy.breaker import BreakerState
from helios.proxy.catalogue import ModelEntry
from helios.proxy.core import Core
from helios.proxy.express.express import MAX_SHARED_REPLICAS
from helios.proxy.express.granting import LaneCandidate, LaneView, lane_view
from helios.proxy.express.lane import ExpressPolicy
from helios.proxy.fleet.commands import DrainReplica, SleepReplica
from helios.proxy.fleet.state import Load, ReplicaState
from helios.proxy.holds import Hold
from helios.proxy.retries import RetryBudgets, RetryPolicy
from helios.proxy.routing.pick import Wishes
from helios.proxy.routing.prefix import Blocks
from helios.proxy.routing.table import Locality
from helios.proxy.traffic import LoadDelta, RoutingPolicy
from tests.proxy.support import GIB, core, entry, hello, policy, replica

QUEUE_COUNT = 4
LANE = ExpressPolicy(model_count=2, per_second=0.2, settle_seconds=0.0)
ROUTING = RoutingPolicy(queue_count=QUEUE_COUNT, express=LANE)
LOADS = st.builds(Load, st.integers(0, 9), st.integers(0, QUEUE_COUNT + 1), st.floats(0, 1))
PLACES = st.tuples(st.sampled_from(["n", "o"]), st.sampled_from(["z", "y"]))
SHARES = st.floats(0, 0.45)
WEIGHTS = st.builds(
    ModelRouting,
    queue_weight=st.floats(0.01, 1),
    running_weight=st.floats(0, 1),
    kv_weight=st.floats(0, 1),
    prefix_weight=SHARES,
    session_weight=SHARES,
    locality_weight=SHARES,
)
PROMPT = Blocks((11, 12, 13, 14, 15))


def several(count: int = 2, routing: RoutingPolicy = ROUTING, wanted: ModelEntry | None = None) -> Core:
    """A core whose model has so many replicas, r0 and on, each on a worker of its own, w0 and on."""
    subject = core(replace(policy(), routing=routing))
    subject.models_replaced([replace(wanted or entry(), min_replicas=count)], 0.0, is_synced=True)
    for number in range(count):
        one = replica(f"r{number}", worker_id=f"w{number}", address=f"127.0.0.1:{1000 + number}")
        # There is no room for others beside them, which would be started until all are there.
        subject.worker_hello(hello(f"w{number}", replicas=(one,), memory_bytes=GIB), 0.0)
    subject.endpoints_acknowledged(subject.fleet.endpoints(), 0.0)
    return subject


def in_lane(count: int = 2, routing: RoutingPolicy = ROUTING, wanted: ModelEntry | None = None) -> Core:
    """The same, once it has been asked for."""
    subject = several(count, routing, wanted)
    ask(subject, 0.0)
    return subject


def ask(subject: Core, now: float) -> None:
    """Has the model asked for, for two seconds."""
    for _ in range(2):
        now += 1.0
        for one in subject.fleet.replicas_of("m"):
            subject.worker_seen(one.worker_id, now)
        subject.load_report([LoadDelta("r0", Load(), ("a",), (("a", 0),))], now)
        subject.tick(now)


def granted(subject: Core, now: float = 2.0) -> LaneView:
    """What Envoy is told."""
    found = subject.express.lease(named(subject), now)
    assert found is not None
    return found


def named(subject: Core) -> ModelEntry:
    found = subject.catalogue.get("m")
    assert found is not None
    return found


def may_pick(view: LaneView) -> list[str]:
    """Candidates with room."""
    return [candidate.replica_id for candidate in view.candidates if candidate.room != 0]


def told_score(view: LaneView, candidate: LaneCandidate, held: dict[str, int], home: str) -> float:
    """The formula of the contract, of a request with PROMPT."""
    prefix = view.prefix_weight if held else 0.0
    session = view.session_weight if home else 0.0
    load = candidate.fixed_score + view.running_weight / (1 + candidate.running_count)
    ratio = held.get(candidate.replica_id, 0) / len(PROMPT)
    return (1 - prefix - session) * load + prefix * ratio + session * (candidate.replica_id == home)


@given(
    loads=st.lists(st.tuples(LOADS, st.integers(0, 3), PLACES, st.integers(0, 5)), min_size=2, max_size=5),
    weights=WEIGHTS,
    session=st.sampled_from(["", "s", "t"]),
    knows_place=st.booleans(),
)
def test_by_what_is_told_the_score_of_each_candidate_is_the_pickers(
    loads: list[tuple[Load, int, tuple[str, str], int]], weights: ModelRouting, session: str, knows_place: bool
) -> None:
    routing = replace(ROUTING, locality=Locality("n", "z") if knows_place else Locality())
    subject = several(len(loads), routing, replace(entry(), routing=weights))
    traffic, model = subject.traffic, named(subject)
    for number, (load, on_the_way_count, (node, zone), held_count) in enumerate(loads):
        replica_id = f"r{number}"
        one = subject.fleet.replica(replica_id)
        assert one is not None
        told = hello(f"w{number}", replicas=(one,), memory_bytes=GIB)
        subject.worker_hello(replace(told, node=node, zone=zone), 0.0)
        subject.load_report([LoadDelta(replica_id, load)], 0.0)
        for request in range(on_the_way_count):
            traffic.ledger.reserve(f"{replica_id} {request}", replica_id, 0.0)
            traffic.refresh(replica_id)
        if held_count:
            traffic.prompt_sent(model, replica_id, f"p{number}", Blocks(PROMPT[:held_count]))
    view = lane_view(traffic, model)
    held = traffic._prefixes.match(PROMPT) if traffic.rules_of("m").weights.prefix else {}
    chosen = traffic.pick(model, "q", 0.0, None, Wishes(PROMPT, session))
    assert (view is None) == (chosen is None)
    if view is None or chosen is None:
        return
    considered = {candidate.replica_id: candidate for candidate in chosen.considered}
    assert may_pick(view) == list(considered), "those with room, in the order in which equal ones go"
    if len(considered) == 1:
        return
    home = next((one.replica_id for one in chosen.considered if one.session_score), "")
    by_place = chosen.session_weight and not home  # It is one that takes no more.
    scores = {one.replica_id: told_score(view, one, held, home) for one in view.candidates if one.room != 0}
    if not by_place:
        assert scores == {key: pytest.approx(one.score, abs=1e-12) for key, one in considered.items()}
    best = max(scores.values())
    assert best - scores[chosen.choices[0].replica_id] < 1e-12


@given(load=LOADS, on_the_way_count=st.integers(0, 6), bound=st.integers(0, QUEUE_COUNT))
def test_who_is_told_of_room_is_busy_when_that_is_used_up(load: Load, on_the_way_count: int, bound: int) -> None:
    subject = several(2, replace(ROUTING, queue_count=bound))
    traffic = subject.traffic
    subject.load_report([LoadDelta("r1", load)], 0.0)

    def reserve(request: str) -> None:
        traffic.ledger.reserve(request, "r1", 0.0)
        traffic.refresh("r1")

    for number in range(on_the_way_count):
        reserve(str(number))
    view = lane_view(traffic, named(subject))
    assert view is not None
    (room,) = (candidate.room for candidate in view.candidates if candidate.replica_id == "r1")
    assert (room is None) == (not load.waiting_count or not bound)
    if room is None:
        assert "r1" not in traffic.busy
        return
    for number in range(room):
        assert "r1" not in traffic.busy
        reserve(f"more {number}")
    assert "r1" in traffic.busy


def test_nothing_is_granted_while_all_are_busy() -> None:
    subject = in_lane()
    subject.load_report([LoadDelta("r0", Load(waiting_count=99))], 2.0)
    view = granted(subject)
    assert may_pick(view) == ["r1"]
    assert len(view.candidates) == 2, "what a busy one holds is not to be forgotten"
    subject.load_report([LoadDelta("r1", Load(waiting_count=99))], 2.0)
    assert subject.express.lease(named(subject), 2.0) is None


def test_cordoned_workers_are_left_out_where_others_take_requests() -> None:
    subject = in_lane(3)
    subject.cordon("w0", 2.0, is_cordoned=True)
    view = granted(subject)
    assert may_pick(view) == ["r1", "r2"]
    assert len(view.candidates) == 3, "sessions keep their homes"
    for replica_id in ("r1", "r2"):
        subject.load_report([LoadDelta(replica_id, Load(waiting_count=99))], 2.0)
    assert may_pick(granted(subject)) == ["r0"], "a cordon makes nobody wait"
    subject.load_report([LoadDelta("r1", Load())], 2.0)
    for number in (1, 2):
        subject.cordon(f"w{number}", 2.0, is_cordoned=True)
    assert may_pick(granted(subject)) == ["r0", "r1"]


def fail(subject: Core, replica_id: str) -> None:
    """Opens a replica's circuit."""
    failures = tuple((f"f{number}", 13) for number in range(3))
    subject.load_report([LoadDelta(replica_id, Load(), finished=failures)], 2.0)


def test_the_request_that_tries_a_replica_out_is_the_pickers_to_send() -> None:
    subject = in_lane()
    fail(subject, "r1")
    assert [one.replica_id for one in granted(subject).candidates] == ["r0"]
    subject.traffic.tick(9.0)
    assert subject.traffic.breakers.state("r1") is BreakerState.HALF_OPEN
    # As good as the other one, which is the first.
    assert may_pick(granted(subject, 9.0)) == ["r0"]
    subject.load_report([LoadDelta("r0", Load(running_count=5))], 9.0)
    assert subject.express.lease(named(subject), 9.0) is None, "the picker would send it the next one"
    pick = subject.pick(named(subject), "probe", 9.0)
    assert pick is not None
    assert pick.choices[0].replica_id == "r1"
    assert [one.replica_id for one in granted(subject, 9.0).candidates] == ["r0"]
    subject.load_report([LoadDelta("r1", Load(), ("probe",), (("probe", 0),))], 9.0)
    assert may_pick(granted(subject, 9.0)) == ["r0", "r1"]


def test_only_replicas_of_the_served_revision_are_told_of() -> None:
    subject = in_lane(3)
    old = replica("r2", revision="sha256:0", worker_id="w2", address="127.0.0.1:1002")
    subject.replica_event("w2", 1, old, 2.0)
    view = granted(subject)
    assert view.revision == "sha256:1"
    assert [candidate.replica_id for candidate in view.candidates] == ["r0", "r1"]


def test_what_else_is_told_is_what_the_picker_goes_by() -> None:
    subject = in_lane()
    view = granted(subject)
    assert (view.retry_count, view.context_tokens, view.tokens_per_byte) == (2, 0, 0.25)
    for _ in range(20):
        subject.traffic.retries.retried("m")
    subject.traffic.quotas.history.learn("m", "", 1000, 500, 10)
    for number, context_tokens in enumerate((4096, 2048)):
        one = subject.fleet.replica(f"r{number}")
        assert one is not None
        subject.replica_event(f"w{number}", 1, replace(one, max_context_tokens=context_tokens), 2.0)
    view = granted(subject)
    assert (view.retry_count, view.context_tokens, view.tokens_per_byte) == (0, 2048, 0.5)


@given(steps=st.lists(st.booleans(), max_size=60), burst=st.integers(0, 4), ratio=st.sampled_from([0.0, 0.2, 0.5, 1.0]))
def test_a_look_at_the_retry_budget_says_what_a_request_would_hear(steps: list[bool], burst: int, ratio: float) -> None:
    budgets = RetryBudgets(RetryPolicy(ratio, burst))
    for is_retry in steps:
        if is_retry:
            budgets.retried("m")
        assert budgets.allows("m") == budgets.allows("m") == budgets.request("m")


def required(subject: Core) -> None:
    subject.keyring.is_required = True


def waits(subject: Core) -> None:
    subject.holds.admit(Hold(1, "q", "m", 1, 2.0, 9.0))


def is_unwanted(subject: Core) -> None:
    subject.models_replaced([], 2.0, is_synced=True)


def has_canary(subject: Core) -> None:
    subject.model_upserted(replace(named(subject), canary="m@123456789abc", canary_percent=10), 2.0)


def draws(subject: Core) -> None:
    subject.model_upserted(replace(named(subject), routing=ModelRouting(choice=Choice.POWER_OF_TWO)), 2.0)


def keeps_places(subject: Core) -> None:
    subject.model_upserted(replace(named(subject), routing=ModelRouting(kept_for_high_ratio=0.5)), 2.0)


def goes(subject: Core) -> None:
    for number in range(2):
        subject.worker_lost(f"w{number}", 2.0)


@pytest.mark.parametrize("change", [required, waits, is_unwanted, has_canary, draws, keeps_places, goes])
def test_nothing_is_granted_of_a_model_that_is_not_fit_any_more(change: Callable[[Core], None]) -> None:
    subject = in_lane(routing=replace(ROUTING, draw=lambda _: 0))
    model = named(subject)
    assert subject.express.lease(model, 2.0) is not None
    change(subject)
    assert subject.express.lease(model, 2.0) is None
    subject.tick(2.5)
    assert not subject.express.lane.places


def test_a_model_whose_best_replica_is_drawn_is_fit_where_nobody_draws() -> None:
    subject = in_lane(wanted=replace(entry(), routing=ModelRouting(choice=Choice.POWER_OF_TWO)))
    assert subject.express.lease(named(subject), 2.0) is not None


def test_a_model_that_is_not_in_the_lane_is_granted_nothing() -> None:
    subject = several()
    assert subject.express.place_of("m") is not None
    assert subject.express.lease(named(subject), 2.0) is None
    assert not subject.traffic.losses.is_kept
    assert not subject.express.lane.has_carried("r0")


@pytest.mark.parametrize("count", [1, 2, MAX_SHARED_REPLICAS, MAX_SHARED_REPLICAS + 1])
def test_a_model_of_some_replicas_is_shared(count: int) -> None:
    subject = several(count)
    place = subject.express.place_of("m")
    assert (place is not None and place.is_shared) == (2 <= count <= MAX_SHARED_REPLICAS)


def test_a_lease_keeps_orders_back_and_says_what_came_by_the_lane() -> None:
    subject = in_lane()
    lane = subject.express.lane
    assert subject.express.pick_of("r0") is None
    granted(subject, 2.0)
    # What was picked at its end is on its way.
    assert lane.may_get_requests("r0", 2.74)
    assert not lane.may_get_requests("r0", 2.75)
    pick = subject.express.pick_of("r0")
    assert pick is not None
    assert pick.explain() == "one of 2 replicas, by Envoy's express lane"
    lane.expire(62.75)
    assert lane.has_carried("r0")
    lane.expire(62.8)
    assert not lane.has_carried("r0")
    assert subject.express.pick_of("r0") is None


def stopped(todo: list[actions.Action]) -> list[str]:
    """Replicas that are told to take no more requests."""
    orders = [action.command.order for action in todo if isinstance(action, actions.Send)]
    return [order.replica_id for order in orders if isinstance(order, DrainReplica | SleepReplica)]


@pytest.mark.parametrize("is_sleep", [True, False])
def test_what_is_ordered_of_a_replica_of_a_lease_waits_until_that_is_over(is_sleep: bool) -> None:
    subject = in_lane()
    one = subject.fleet.replica("r0")
    assert one is not None
    granted(subject, 2.0)
    if is_sleep:
        subject.lifecycle.warmth.sleep(one)
    else:
        subject.lifecycle.drain(one, 2.0)
    assert not stopped(subject.follow_up(2.0))
    assert not subject.traffic.is_candidate("r0")
    assert may_pick(granted(subject, 2.1)) == ["r1"], "the next lease is without it"
    assert not stopped(subject.tick(2.7))
    assert one.address in subject.express.lane.addresses() | subject.fleet.endpoints()
    assert stopped(subject.tick(2.8)) == ["r0"]
    assert one.address not in subject.express.lane.addresses()


def test_what_is_ordered_of_a_replica_that_no_lease_has_does_not_wait() -> None:
    subject = in_lane()
    subject.load_report([LoadDelta("r0", Load(waiting_count=99))], 2.0)
    granted(subject, 2.0)
    one = subject.fleet.replica("r0")
    assert one is not None
    subject.lifecycle.drain(one, 2.0)
    assert stopped(subject.follow_up(2.0)) == ["r0"]


def test_what_is_said_of_a_model_that_has_but_one_replica_left_was_true_before() -> None:
    subject = in_lane()
    granted(subject)
    # Nothing is started in its place.
    subject.cordon("w1", 2.0, is_cordoned=True)
    subject.replica_event("w1", 1, replica("r1", state=ReplicaState.STOPPED, worker_id="w1"), 2.0)
    assert [one.replica_id for one in subject.fleet.replicas_of("m")] == ["r0"]
    pick = subject.express.pick_of("r0")
    assert pick is not None
    assert pick.explain() == "one of 2 replicas, by Envoy's express lane"
    # What comes from the next place on has no choice.
    ask(subject, 2.0)
    pick = subject.express.pick_of("r0")
    assert pick is not None
    assert pick.explain() == "the model's only replica, by Envoy's express lane"
