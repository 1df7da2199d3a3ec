"""Ten models on a device that has room for one or two: each has its turn, and no more switches than it takes.

What users of llama-swap, and of gateways with models at zero, complain of is here as cases: models that displace one
another with every request, a model that is loaded twice, a start that is displaced before it served, a model that never
comes up again, and clients that wait for ever.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helios.mesh.gangs import GangDevice
from helios.proxy import actions
from helios.proxy.activation.turns import Claim, Line, TurnPolicy
from helios.proxy.core import Core
from helios.proxy.fleet.commands import Command, DrainReplica, StartReplica, StopReplica
from helios.proxy.fleet.state import Device, DeviceKind, Load, Replica, ReplicaState, WorkerHello
from helios.proxy.holds import Hold, HoldLimits
from helios.proxy.traffic import LoadDelta
from tests.proxy.support import GIB, core, entry, hello, policy, ready, replica

STEP = 0.5
RESIDENCY = 10.0
TURN = 30.0
START = 4.0
MODELS = tuple(f"m{number}" for number in range(10))


@dataclass
class Job:
    """A request at a replica."""

    request_id: str
    ends_at: float


@dataclass
class Node:
    """What one worker does with its orders, on a clock of its own: starts, answers and drains take their time."""

    room: int
    answer_seconds: float
    limit_seconds: float = 300.0
    turn_seconds: float = TURN
    now: float = 0.0
    sequence: int = 0
    port: int = 1000
    next_request: int = 0
    replicas: dict[str, Replica] = field(default_factory=dict)
    ready_at: dict[str, float] = field(default_factory=dict)
    jobs: dict[str, list[Job]] = field(default_factory=lambda: defaultdict(list))
    draining: dict[str, float] = field(default_factory=dict)
    holds: dict[int, Hold] = field(default_factory=dict)
    waited: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    outcomes: Counter[str] = field(default_factory=Counter)
    starts: list[tuple[float, str]] = field(default_factory=list)
    served: Counter[str] = field(default_factory=Counter)
    cut_off: int = 0

    def __post_init__(self) -> None:
        base = policy(holds=HoldLimits(model_count=64), residency_seconds=RESIDENCY, idle_seconds=900.0)
        turns = TurnPolicy(turn_seconds=self.turn_seconds, drain_seconds=120.0)
        self.core: Core = core(replace(base, lifecycle=replace(base.lifecycle, turns=turns, start_base_seconds=START)))
        self.core.models_replaced([entry(name, revision=f"sha256:{name}") for name in MODELS], 0.0, is_synced=True)
        # A model books one GiB.
        device = Device("cpu:0", DeviceKind.CPU, self.room * GIB + GIB // 2, 0)
        self.apply(self.core.worker_hello(WorkerHello("w", "1", "node", (device,), ("vllm",), 8, ()), 0.0))

    def apply(self, todo: list[actions.Action]) -> None:
        for action in todo:
            match action:
                case actions.Send(command):
                    self.obey(command)
                case actions.Release(hold, pick):
                    self.holds.pop(hold.hold_id)
                    self.waited[hold.model].append(self.now - hold.since)
                    self.begin(pick.choices[0].replica_id, hold.request_id)
                case actions.Fail(hold, error):
                    self.holds.pop(hold.hold_id)
                    self.outcomes[error.reason] += 1
                    assert error.retry_after_seconds
                    assert self.now - hold.since <= self.limit_seconds + STEP
                case _:
                    pass

    def obey(self, command: Command) -> None:
        match command.order:
            case StartReplica() as order:
                booked = sum(held.memory_bytes for held in self.replicas.values())
                assert booked + order.memory_bytes <= self.room * GIB + GIB // 2, "the device has no room for it"
                assert all(held.model != order.model for held in self.replicas.values()), "loaded twice"
                self.starts.append((self.now, order.model))
                asked = self.core.fleet.replica(order.replica_id)
                assert asked is not None
                self.replicas[order.replica_id] = asked
                self.ready_at[order.replica_id] = self.now + START
            case DrainReplica(replica_id, seconds):
                self.draining.setdefault(replica_id, self.now + seconds)
            case StopReplica(replica_id):
                self.draining[replica_id] = self.now
            case _:
                pass

    def begin(self, replica_id: str, request_id: str) -> None:
        held = self.replicas[replica_id]
        self.served[held.model] += 1
        self.jobs[replica_id].append(Job(request_id, self.now + self.answer_seconds))
        load = Load(running_count=len(self.jobs[replica_id]))
        self.apply(self.core.load_report([LoadDelta(replica_id, load, started=(request_id,))], self.now))

    def request(self, model: str) -> None:
        self.next_request += 1
        request_id = f"q{self.next_request}"
        asked = self.core.resolve(model)
        assert asked is not None
        pick = self.core.pick(asked, request_id, self.now)
        if pick is not None:
            self.waited[model].append(0.0)
            self.begin(pick.choices[0].replica_id, request_id)
            return
        hold, todo = self.core.hold(
            asked, request_id, size_bytes=1, deadline=self.now + self.limit_seconds, now=self.now
        )
        self.holds[hold.hold_id] = hold
        self.apply(todo)

    def tell(self, item: Replica) -> None:
        self.sequence += 1
        self.apply(self.core.replica_event("w", self.sequence, item, self.now))

    def step(self) -> None:
        """Half a second passes."""
        self.now += STEP
        for replica_id, at in list(self.ready_at.items()):
            if at <= self.now:
                del self.ready_at[replica_id]
                self.port += 1
                self.replicas[replica_id] = ready(self.replicas[replica_id], f"127.0.0.1:{self.port}")
                self.tell(self.replicas[replica_id])
        for replica_id, jobs in self.jobs.items():
            ended = [job for job in jobs if job.ends_at <= self.now]
            for job in ended:
                jobs.remove(job)
            self.outcomes["answered"] += len(ended)
            if ended and replica_id in self.replicas:
                done = tuple((job.request_id, 0) for job in ended)
                delta = LoadDelta(replica_id, Load(running_count=len(jobs)), finished=done)
                self.apply(self.core.load_report([delta], self.now))
        for replica_id, until in list(self.draining.items()):
            if until <= self.now or not self.jobs[replica_id]:
                del self.draining[replica_id]
                self.ready_at.pop(replica_id, None)
                self.cut_off += len(self.jobs.pop(replica_id, []))
                gone = self.replicas.pop(replica_id)
                self.tell(replace(gone, state=ReplicaState.STOPPED))
        self.apply(self.core.endpoints_acknowledged(self.core.fleet.endpoints(), self.now))
        self.apply(self.core.expire_holds(self.now))
        self.apply(self.core.worker_seen("w", self.now))
        if not self.now % 1:
            self.apply(self.core.tick(self.now))

    def run(self, seconds: float, every: float, models: tuple[str, ...] = MODELS) -> None:
        """Asks for each model every so many seconds, each a moment after the one before."""
        end = self.now + seconds
        due = {model: self.now + STEP * number for number, model in enumerate(models)}
        while self.now < end:
            for model, at in due.items():
                if at <= self.now:
                    due[model] = at + every
                    self.request(model)
            self.step()

    def settle(self) -> None:
        """Waits until nobody waits."""
        end = self.now + self.limit_seconds + 60
        while (self.holds or any(self.jobs.values())) and self.now < end:
            self.step()
        assert not self.holds, "somebody waits for ever"


@pytest.mark.parametrize("room", [1, 2])
@pytest.mark.parametrize("every", [5.0, 40.0])
def test_ten_models_on_a_device_take_turns_and_each_is_served(room: int, every: float) -> None:
    world = Node(room=room, answer_seconds=3.0)
    world.run(300.0, every)
    world.settle()
    assert set(world.served) == set(MODELS), "a model that is in the line gets its turn"
    assert sum(world.outcomes.values()) == world.next_request
    assert world.cut_off == 0
    # Each start has its time and the residency; nothing switches more often.
    assert len(world.starts) <= room * (world.now / (START + RESIDENCY) + 1)
    # In ten turns, each model has had one.
    longest = 10 * (START + max(RESIDENCY, START) + TURN) / room
    for at, model in world.starts:
        later = [start for start, other in world.starts if other == model and start > at]
        assert not later or later[0] - at <= longest
    if every == 40.0:
        assert world.outcomes["answered"] == world.next_request, "nobody need be refused"


def test_two_models_in_turn_do_not_displace_each_other_with_every_request() -> None:
    world = Node(room=1, answer_seconds=0.5)
    world.run(300.0, 1.0, ("m0", "m1"))
    world.settle()
    assert world.outcomes == {"answered": world.next_request}
    # With every request it would be 600 starts.
    assert 6 <= len(world.starts) <= 300 / (START + RESIDENCY) + 1
    assert abs(sum(model == "m0" for _, model in world.starts) - len(world.starts) / 2) <= 1, "they alternate"


def test_a_replica_that_never_rests_gives_way_and_its_requests_end() -> None:
    world = Node(room=1, answer_seconds=20.0)
    world.run(20.0, 2.0, ("m0",))
    world.request("m1")
    world.run(120.0, 2.0, ("m0",))
    assert world.served["m1"] == 1
    assert world.waited["m1"][0] <= TURN + 20.0 + START + 5
    world.settle()
    assert world.cut_off == 0
    assert world.outcomes == {"answered": world.next_request}


def test_what_is_in_use_is_left_alone_where_nobody_may_take_its_room() -> None:
    world = Node(room=1, answer_seconds=20.0, turn_seconds=0.0)
    world.run(20.0, 2.0, ("m0",))
    world.request("m1")
    assert world.outcomes["NO_CAPACITY"] == 1, "no room is coming, so it is said at once"


def test_no_start_gives_way_before_it_has_served_its_queue() -> None:
    world = Node(room=1, answer_seconds=1.0)
    world.run(5.0, 100.0)
    for _ in range(20):
        world.request("m9")
    for _ in range(400):
        before = {model: world.served[model] for model in MODELS}
        waiting = Counter(hold.model for hold in world.holds.values())
        up = {held.model for key, held in world.replicas.items() if key not in world.draining}
        world.step()
        gone = up - {held.model for key, held in world.replicas.items() if key not in world.draining}
        for model in gone:
            assert world.served[model] > 0
            assert not waiting[model] or world.served[model] > before[model]
    assert len(world.starts) == 10, "one start served all that waited for a model"
    # First come, first started.
    assert [model for _, model in world.starts] == list(MODELS)


def test_who_waits_longest_is_next_whatever_its_name() -> None:
    world = Node(room=1, answer_seconds=1.0)
    world.request("m5")
    for model in ("m9", "m3", "m7", "m1"):
        world.step()
        world.request(model)
    world.settle()
    assert [model for _, model in world.starts] == ["m5", "m9", "m3", "m7", "m1"]


def test_what_is_told_of_the_wait_grows_with_the_line() -> None:
    world = Node(room=1, answer_seconds=1.0)
    for model in ("m0", "m1", "m2", "m3"):
        world.request(model)
        world.step()
    told = []
    for model in ("m1", "m2", "m3"):
        asked = world.core.resolve(model)
        assert asked is not None
        told.append(world.core.lifecycle.remaining_seconds(asked, world.now))
    assert told == sorted(set(told)), "who is further back hears of a longer wait"
    world.settle()


def test_a_client_that_leaves_the_line_leaves_no_claim_behind() -> None:
    world = Node(room=1, answer_seconds=60.0)
    world.request("m0")
    for _ in range(20):
        world.step()
    world.request("m1")
    world.request("m2")
    first = next(hold for hold in world.holds.values() if hold.model == "m1")
    while "m0" in {held.model for key, held in world.replicas.items() if key not in world.draining}:
        world.step()
    world.core.cancel_hold(first)
    world.holds.pop(first.hold_id)
    world.settle()
    assert [model for _, model in world.starts] == ["m0", "m2"]


def test_a_worker_that_is_away_for_a_moment_ends_nobodys_wait_and_nobodys_place_in_the_line() -> None:
    world = Node(room=1, answer_seconds=400.0, turn_seconds=100.0)
    for model in ("m0", "m9", "m1"):
        world.request(model)
        for _ in range(20):
            world.step()
    for _ in range(100):
        world.step()
    line = world.core.lifecycle.room.line
    waited = line.waited_seconds("m9", world.now)
    world.apply(world.core.worker_lost("w", world.now))
    for _ in range(4):
        world.now += STEP
        world.apply(world.core.expire_holds(world.now))
        world.apply(world.core.tick(world.now))
    world.step()
    assert not +world.outcomes, "they waited for the worker for two seconds"
    assert line.models() == ("m9", "m1")
    assert line.waited_seconds("m9", world.now) > waited
    # For a worker that stays away, they don't wait as long as for room.
    world.apply(world.core.worker_lost("w", world.now))
    for _ in range(35):
        world.now += 1.0
        world.apply(world.core.tick(world.now))
    assert world.outcomes["NO_WORKER"] == 2
    assert not line.models()


def test_in_a_long_line_those_behind_are_looked_at_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helios.proxy.activating._MOST_LOOKS", 2)
    subject = core(policy(residency_seconds=5.0))
    engines = ("vllm", "other")
    used = [entry(f"used-{engine}", revision=f"sha256:{engine}") for engine in engines]
    waiting = [entry(f"m{number}", revision=f"sha256:{number}") for number in range(6)]
    waiting[5] = replace(waiting[5], engine_settings='{"engine": "other"}')
    waiting[:5] = [replace(each, engine_settings='{"engine": "vllm"}') for each in waiting[:5]]
    subject.models_replaced([*used, *waiting], 0.0, is_synced=True)
    for engine in engines:
        held = replica(engine, model=f"used-{engine}", revision=f"sha256:{engine}", worker_id=engine, address=engine)
        worker = replace(hello(engine, replicas=(held,), memory_bytes=GIB), engines=(engine,))
        subject.worker_hello(worker, 0.0)
        subject.load_report([LoadDelta(engine, Load(running_count=1), started=(engine,))], 0.0)
    for each in waiting:
        subject.hold(each, each.name, size_bytes=0, deadline=100.0, now=1.0)
    assert len(subject.lifecycle.room.line) == 6
    # What the last one waits for is not what the others do.
    subject.load_report([LoadDelta("other", Load(), finished=(("other", 0),))], 6.0)
    todo = [action for tenth in range(20) for action in subject.expire_holds(6.0 + tenth / 10)]
    orders = [action.command.order for action in todo if isinstance(action, actions.Send)]
    assert orders == [DrainReplica("other", 30.0)]


@settings(max_examples=15, deadline=None)
@given(
    room=st.integers(1, 2),
    answer_seconds=st.sampled_from([0.5, 3.0, 25.0]),
    requests=st.lists(st.tuples(st.integers(0, 40), st.sampled_from(MODELS)), min_size=1, max_size=60),
)
def test_every_request_is_answered_or_refused_in_its_time_and_switches_are_bounded(
    room: int, answer_seconds: float, requests: list[tuple[int, str]]
) -> None:
    world = Node(room=room, answer_seconds=answer_seconds)
    for pause, model in requests:
        for _ in range(pause):
            world.step()
        world.request(model)
    world.settle()
    assert sum(world.outcomes.values()) == len(requests)
    assert world.cut_off == 0
    assert len(world.starts) <= room * (world.now / (START + RESIDENCY) + 1)


# The line itself.
def test_a_place_in_the_line_is_kept_and_claims_go_with_it() -> None:
    line = Line()
    line.join("b", 1.0)
    line.join("a", 2.0)
    line.join("b", 3.0)
    assert line.models() == ("b", "a")
    assert (line.waited_seconds("b", 4.0), line.waited_seconds("c", 4.0)) == (3.0, 0.0)
    claim = Claim("w", ("d0",), 5)
    line.claim("b", claim)
    line.claim("c", claim)
    assert line.claims_on("w", "a") == [claim]
    assert line.claims_on("w", "b") == [] == line.claims_on("v", "a")
    assert [device.free_bytes for device in claim.book([GangDevice("d0", "", 3), GangDevice("d1", "", 3)])] == [-2, 3]
    line.leave("b")
    assert line.claims_on("w", "a") == []
    assert line.models() == ("a",)
