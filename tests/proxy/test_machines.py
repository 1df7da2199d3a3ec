"""Hypothesis runs through the pure state machines; each invariant is a rule or an invariant with its name."""

from collections import Counter
from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helios.mesh.errors import HoldExpired, Overloaded
from helios.proxy import actions
from helios.proxy.activation import machine
from helios.proxy.activation.machine import Activation, ActivationPolicy, ActivationState
from helios.proxy.breaker import BreakerPolicy, Breakers, BreakerState
from helios.proxy.fleet.commands import Command, DrainReplica, SleepReplica, StartReplica, StopReplica, WakeReplica
from helios.proxy.fleet.state import FleetState, Load, Replica, ReplicaState
from helios.proxy.holds import Hold, HoldLimits, Holds
from helios.proxy.ledger import Ledger
from helios.proxy.traffic import LoadDelta
from tests.proxy.support import GIB, core, entry, hello, policy, replica

IDS = st.sampled_from(["a", "b", "c"])
REQUESTS = st.sampled_from([f"q{number}" for number in range(6)])
STATES = st.sampled_from(list(ReplicaState))
# What goes wrong goes wrong now and then; else no request would ever get through to the interesting states.
RARELY = st.sampled_from([False] * 7 + [True])


class LedgerMachine(RuleBasedStateMachine):
    """The ledger against a plain list of reservations."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(ttl_seconds=10.0)
        self.now = 0.0
        self.reserved: dict[str, tuple[str, float]] = {}
        self.running: set[tuple[str, str]] = set()

    @rule(request=REQUESTS, replica_id=IDS)
    def reserve(self, request: str, replica_id: str) -> None:
        older = self.reserved.pop(request, None)
        assert self.ledger.reserve(request, replica_id, self.now) == (older[0] if older else None)
        self.reserved[request] = (replica_id, self.now + 10.0)

    @rule(request=REQUESTS, replica_id=IDS)
    def start(self, request: str, replica_id: str) -> None:
        older = self.reserved.pop(request, None)
        assert self.ledger.started(request, replica_id) == (older[0] if older else None)
        self.running.add((replica_id, request))

    @rule(request=REQUESTS, replica_id=IDS)
    def finish(self, request: str, replica_id: str) -> None:
        self.ledger.finished(request, replica_id)
        if (replica_id, request) in self.running:
            self.running.discard((replica_id, request))
        else:
            self.reserved.pop(request, None)

    @rule(seconds=st.floats(0.0, 12.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        expired = {reservation.request_id for reservation in self.ledger.expire(self.now)}
        due = {request for request, (_, expires_at) in self.reserved.items() if expires_at <= self.now}
        assert expired == due
        for request in due:
            del self.reserved[request]

    @rule(replica_id=IDS)
    def lose_a_replica(self, replica_id: str) -> None:
        self.ledger.forget_replica(replica_id)
        self.reserved = {key: value for key, value in self.reserved.items() if value[0] != replica_id}
        self.running = {pair for pair in self.running if pair[0] != replica_id}

    @invariant()
    def test_counts_are_the_sums_of_the_entries(self) -> None:
        reserved = Counter(replica_id for replica_id, _ in self.reserved.values())
        running = Counter(replica_id for replica_id, _ in self.running)
        for replica_id in "abc":
            assert self.ledger.reserved_count(replica_id) == reserved[replica_id]
            assert self.ledger.running_count(replica_id) == running[replica_id]
            assert self.ledger.is_idle(replica_id) == (not reserved[replica_id] and not running[replica_id])
        statistics = self.ledger.statistics()
        assert (statistics.reserved_count, statistics.running_count) == (len(self.reserved), len(self.running))


class HoldsMachine(RuleBasedStateMachine):
    """Holds against a list."""

    LIMITS = HoldLimits(model_count=3, total_count=5, total_bytes=100)

    def __init__(self) -> None:
        super().__init__()
        self.holds = Holds(self.LIMITS)
        self.now = 0.0
        self.next_id = 0
        self.held: list[Hold] = []

    @rule(model=IDS, size=st.integers(0, 60), seconds=st.floats(0.1, 20.0))
    def admit(self, model: str, size: int, seconds: float) -> None:
        self.next_id += 1
        hold = Hold(self.next_id, f"q{self.next_id}", model, size, self.now, self.now + seconds)
        is_full = (
            sum(1 for other in self.held if other.model == model) >= 3
            or len(self.held) >= 5
            or sum(other.size_bytes for other in self.held) + size > 100
        )
        try:
            self.holds.admit(hold)
        except Overloaded as error:
            assert is_full
            assert error.metadata["bound"] in ("model_count", "total_count", "total_bytes")  # noqa: PT017 (both outcomes are right, at their time)
        else:
            assert not is_full
            self.held.append(hold)

    @rule(model=IDS)
    def test_holds_of_a_model_are_released_in_the_order_in_which_they_came(self, model: str) -> None:
        expected = next((hold for hold in self.held if hold.model == model), None)
        assert self.holds.first(model) == expected
        if expected is not None:
            assert self.holds.remove(expected.hold_id) == expected
            self.held.remove(expected)

    @precondition(lambda self: self.next_id)
    @rule(data=st.data())
    def test_a_hold_leaves_exactly_once(self, data: st.DataObject) -> None:
        hold_id = data.draw(st.integers(1, self.next_id))
        expected = next((hold for hold in self.held if hold.hold_id == hold_id), None)
        assert self.holds.remove(hold_id) == expected
        assert self.holds.remove(hold_id) is None
        self.held = [hold for hold in self.held if hold.hold_id != hold_id]

    @rule(model=IDS)
    def fail(self, model: str) -> None:
        assert self.holds.take_all(model) == [hold for hold in self.held if hold.model == model]
        self.held = [hold for hold in self.held if hold.model != model]

    @rule(seconds=st.floats(0.0, 15.0))
    def test_no_hold_outlives_its_deadline(self, seconds: float) -> None:
        self.now += seconds
        expired = self.holds.expire(self.now)
        assert set(expired) == {hold for hold in self.held if hold.deadline <= self.now}
        self.held = [hold for hold in self.held if hold.deadline > self.now]

    @invariant()
    def test_count_and_bytes_never_exceed_the_bounds(self) -> None:
        statistics = self.holds.statistics()
        assert statistics.count == len(self.held) <= self.LIMITS.total_count
        assert statistics.size_bytes == sum(hold.size_bytes for hold in self.held) <= self.LIMITS.total_bytes
        for model in "abc":
            count = sum(1 for hold in self.held if hold.model == model)
            assert self.holds.count(model) == count <= self.LIMITS.model_count


class ActivationMachine(RuleBasedStateMachine):
    """One model's activation, driven by anything that can happen to it."""

    def __init__(self) -> None:
        super().__init__()
        self.activation = Activation(ActivationPolicy(wait_seconds=5, start_seconds=20))
        self.now = 0.0
        self.starts = 0
        self.pending: set[str] = set()
        self.pause_until = 0.0

    def feed(self, event: machine.Event, answer: str = "placed") -> None:
        was = self.activation.state
        todo = self.activation.handle(event, self.now)
        while todo:
            action = todo.pop(0)
            if isinstance(action, machine.Place):
                assert was is not ActivationState.STARTING or isinstance(event, machine.Gone)
                assert not self.pending, "a second start while one is under way"
                assert self.now >= self.pause_until, "a start during the pause"
                todo += self.activation.handle(self.place(answer), self.now)
            elif isinstance(action, machine.FailHolds):
                assert action.retry_after_seconds >= 1.0
                assert action.reason
            elif isinstance(action, machine.Abandon):
                self.pending.discard(action.replica_id)
        if self.activation.state is ActivationState.BACKING_OFF and was is not ActivationState.BACKING_OFF:
            self.pause_until = self.now + self.activation.back_off_remaining_seconds(self.now)

    def place(self, answer: str) -> machine.Event:
        if answer == "placed":
            self.starts += 1
            self.pending = {f"r{self.starts}"}
            return machine.Placed(f"r{self.starts}")
        if answer == "delayed":
            return machine.Delayed("NO_WORKER", "none")
        return machine.Refused("NO_CAPACITY", "full", 3.0)

    @rule(answer=st.sampled_from(["placed", "delayed", "refused"]))
    def demand(self, answer: str) -> None:
        self.feed(machine.Demanded(), answer)

    @rule(seconds=st.floats(0.0, 30.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.feed(machine.Tick())

    @precondition(lambda self: self.pending)
    @rule()
    def ready(self) -> None:
        self.feed(machine.Ready(self.pending.pop()))
        assert self.activation.state is ActivationState.IDLE
        assert not self.activation.is_failing

    @precondition(lambda self: self.pending)
    @rule(is_worker_lost=st.booleans())
    def gone(self, is_worker_lost: bool) -> None:
        self.feed(machine.Gone(self.pending.pop(), "ENGINE_DIED", "it died", is_worker_lost), "delayed")

    @precondition(lambda self: self.pending)
    @rule()
    def test_a_start_that_is_withdrawn_is_no_failure(self) -> None:
        before = self.activation.failure_count
        self.feed(machine.Withdrawn(self.pending.pop()))
        assert self.activation.state is ActivationState.IDLE
        assert self.activation.failure_count == before

    @precondition(lambda self: self.pending)
    @rule()
    def test_a_failure_for_good_is_not_tried_again_for_a_long_while(self) -> None:
        self.feed(machine.Gone(self.pending.pop(), "UNSUPPORTED_ARCHITECTURE", "no"))
        assert self.activation.state is ActivationState.BACKING_OFF
        assert self.activation.back_off_remaining_seconds(self.now) == 600

    @rule(is_operator_asking=st.booleans())
    def test_a_changed_model_has_no_past(self, is_operator_asking: bool) -> None:
        if is_operator_asking and self.activation.back_off_remaining_seconds(self.now) > 60:
            # Whoever asks may know that the worker is another one now.
            self.pause_until = self.now
            self.feed(machine.Demanded(by_operator=True))
            assert self.activation.state is ActivationState.STARTING
            return
        was = self.activation.state
        self.feed(machine.Changed())
        if was is ActivationState.BACKING_OFF:
            assert (self.activation.state, self.activation.failure_count) == (ActivationState.IDLE, 0)
            self.pause_until = self.now
        else:
            assert self.activation.state is was

    @rule(is_worker_lost=st.booleans())
    def another_replica_goes(self, is_worker_lost: bool) -> None:
        before = self.activation.state
        self.feed(machine.Gone("another", "ENGINE_DIED", "it died", is_worker_lost))
        assert self.activation.state is before

    @invariant()
    def test_a_replica_is_awaited_exactly_while_starting(self) -> None:
        is_starting = self.activation.state is ActivationState.STARTING
        assert (self.activation.replica_id is not None) == is_starting
        assert bool(self.pending) == is_starting
        assert self.activation.state is not ActivationState.PLACING


class BreakerMachine(RuleBasedStateMachine):
    """One replica's circuit."""

    POLICY = BreakerPolicy(failure_count=3, open_seconds=2, max_open_seconds=8, probe_seconds=5)

    def __init__(self) -> None:
        super().__init__()
        self.breakers = Breakers(self.POLICY)
        self.now = 0.0
        self.failures_in_a_row = 0

    @rule()
    def succeed(self) -> None:
        was = self.breakers.state("r")
        self.breakers.succeeded("r")
        self.failures_in_a_row = 0
        assert self.breakers.state("r") is (BreakerState.OPEN if was is BreakerState.OPEN else BreakerState.CLOSED)

    @rule()
    def fail(self) -> None:
        was = self.breakers.state("r")
        self.failures_in_a_row += 1
        opened = self.breakers.failed("r", self.now)
        if was in (BreakerState.HALF_OPEN, BreakerState.PROBING):
            assert opened
        elif was is BreakerState.CLOSED:
            assert opened == (self.failures_in_a_row >= 3)

    @rule(seconds=st.floats(0.0, 9.0))
    def test_no_circuit_is_open_for_longer_than_its_bound(self, seconds: float) -> None:
        self.now += seconds
        self.breakers.tick(self.now)
        if seconds >= self.POLICY.max_open_seconds:
            assert self.breakers.state("r") in (BreakerState.CLOSED, BreakerState.HALF_OPEN)

    @precondition(lambda self: self.breakers.allows("r"))
    @rule()
    def test_one_probe_at_a_time(self) -> None:
        was = self.breakers.state("r")
        assert self.breakers.picked("r", self.now) == (was is BreakerState.HALF_OPEN)
        assert self.breakers.allows("r") == (was is BreakerState.CLOSED)


class FleetMachine(RuleBasedStateMachine):
    """What is believed of workers, whatever they say and in whatever order."""

    def __init__(self) -> None:
        super().__init__()
        self.fleet = FleetState()
        self.now = 0.0
        self.sequence = 0

    @rule(worker_id=IDS, states=st.dictionaries(IDS, STATES), incarnation=st.sampled_from("12"))
    def test_a_hello_replaces_everything_believed_of_its_worker(
        self, worker_id: str, states: dict[str, ReplicaState], incarnation: str
    ) -> None:
        told = tuple(
            replica(f"{worker_id}{key}", state=state, worker_id=worker_id, model=key) for key, state in states.items()
        )
        self.fleet.hello(hello(worker_id, replicas=told, incarnation=incarnation), (), self.now)
        worker = self.fleet.worker(worker_id)
        assert worker is not None
        assert worker.is_reachable
        assert set(worker.replicas.values()) == {item for item in told if not item.state.is_gone}

    @rule(worker_id=IDS, key=IDS, state=STATES, step=st.integers(0, 2))
    def test_an_older_event_changes_nothing(self, worker_id: str, key: str, state: ReplicaState, step: int) -> None:
        worker = self.fleet.worker(worker_id)
        last = worker.last_sequence if worker is not None else 0
        before = set(self.fleet.replicas())
        item = replica(f"{worker_id}{key}", state=state, worker_id=worker_id, model=key)
        change = self.fleet.replica_event(worker_id, last + step, item, self.now)
        if worker is None or step == 0:
            assert change is None
            assert set(self.fleet.replicas()) == before
        elif not state.is_gone:
            assert self.fleet.replica(item.replica_id) == item

    @rule(worker_id=IDS)
    def test_losing_a_worker_keeps_its_endpoints(self, worker_id: str) -> None:
        before = self.fleet.endpoints()
        self.fleet.lose(worker_id, self.now)
        assert self.fleet.endpoints() == before

    @rule(seconds=st.floats(0.0, 20.0))
    def test_a_worker_is_removed_after_its_grace_and_not_before(self, seconds: float) -> None:
        self.now += seconds
        for worker_id in self.fleet.overdue(self.now, 10.0):
            worker = self.fleet.worker(worker_id)
            assert worker is not None
            assert worker.lost_at is not None
            assert self.now - worker.lost_at > 10.0
            self.fleet.remove_worker(worker_id)

    @invariant()
    def test_the_indexes_agree(self) -> None:
        assert list(self.fleet.check()) == []
        routable = (ReplicaState.READY, ReplicaState.DRAINING)
        expected = {item.address for item in self.fleet.replicas() if item.state in routable}
        assert self.fleet.endpoints() == expected


class CoreMachine(RuleBasedStateMachine):
    """The whole proxy against a model of two workers and an Envoy that acknowledges when it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.core = core(policy(holds=HoldLimits(model_count=4), idle_seconds=50.0, residency_seconds=1.0))
        self.core.models_replaced([entry(name) for name in "abc"], self.now, is_synced=True)
        self.workers: dict[str, dict[str, Replica]] = {}
        self.inbox: list[Command] = []
        self.sequence = Counter[str]()
        self.published: frozenset[str] = frozenset()
        self.connected: set[str] = set()
        self.waiting: dict[int, Hold] = {}
        self.carried_out: set[str] = set()
        self.next_request = 0
        self.next_port = 1000

    def apply(self, todo: list[actions.Action]) -> None:
        for action in todo:
            match action:
                case actions.Send(command):
                    self.inbox.append(command)
                case actions.Release(hold, pick):
                    assert self.waiting.pop(hold.hold_id).model == pick.model
                    self.check_pick(pick.endpoints)
                case actions.Disconnect(worker_id):
                    self.connected.discard(worker_id)
                case actions.Fail(hold, error):
                    assert self.waiting.pop(hold.hold_id) == hold
                    assert error.retry_after_seconds is not None
                    assert error.retry_after_seconds > 0

    def check_pick(self, endpoints: str) -> None:
        """A pick names replicas that are ready at a reachable worker, and that Envoy knows."""
        for address in endpoints.split(","):
            assert address in self.published
            holders = [w for w, held in self.workers.items() for r in held.values() if r.address == address]
            assert holders

    @initialize()
    def begin(self) -> None:
        self.connect("x", forgets=False)

    @rule(worker_id=st.sampled_from("xy"), forgets=RARELY)
    def connect(self, worker_id: str, forgets: bool) -> None:
        held = {} if forgets else self.workers.get(worker_id, {})
        self.workers[worker_id] = held
        self.connected.add(worker_id)
        self.sequence[worker_id] = 0
        incarnation = str(self.now) + str(self.next_request)
        told = hello(worker_id, replicas=tuple(held.values()), memory_bytes=2 * GIB, incarnation=incarnation)
        self.next_request += 1
        self.apply(self.core.worker_hello(told, self.now))

    @rule(worker_id=st.sampled_from("xy"), happens=RARELY)
    def disconnect(self, worker_id: str, happens: bool) -> None:
        if not happens:
            return
        self.inbox = [command for command in self.inbox if command.worker_id != worker_id]
        self.connected.discard(worker_id)
        self.apply(self.core.worker_lost(worker_id, self.now))

    @precondition(lambda self: self.inbox)
    @rule(refuses=RARELY)
    def obey(self, refuses: bool) -> None:
        command = self.inbox.pop(0)
        reason = ""
        if command.command_id not in self.carried_out:
            reason = self.carry_out(command, refuses=refuses)
        todo = self.core.command_acknowledged(
            command.worker_id, command.command_id, refused_reason=reason, message="", now=self.now
        )
        self.apply(todo)

    def carry_out(self, command: Command, *, refuses: bool) -> str:
        held = self.workers[command.worker_id]
        match command.order:
            case StartReplica() as order:
                if refuses:
                    return "NO_CAPACITY"
                self.carried_out.add(command.command_id)
                held[order.replica_id] = Replica(
                    order.replica_id,
                    order.model,
                    order.revision,
                    ReplicaState.LOADING,
                    command.worker_id,
                    memory_bytes=order.memory_bytes,
                )
                self.tell(command.worker_id, held[order.replica_id])
            case SleepReplica(replica_id) | WakeReplica(replica_id):
                return self.carry_out_sleep(command, replica_id, refuses=refuses)
            case DrainReplica(replica_id) | StopReplica(replica_id):
                gone = held.pop(replica_id, None)
                if gone is not None:
                    self.tell(command.worker_id, replica(replica_id, model=gone.model, state=ReplicaState.STOPPED))
            case _:
                pass
        return ""

    def carry_out_sleep(self, command: Command, replica_id: str, *, refuses: bool) -> str:
        item = self.workers[command.worker_id].get(replica_id)
        if item is None or refuses:
            return "NO_CAPACITY"
        self.carried_out.add(command.command_id)
        is_sleep = isinstance(command.order, SleepReplica)
        if item.state is (ReplicaState.READY if is_sleep else ReplicaState.ASLEEP):
            changed = replace(item, state=ReplicaState.ASLEEP if is_sleep else ReplicaState.WAKING)
            self.workers[item.worker_id][replica_id] = changed
            self.tell(command.worker_id, changed)
        return ""

    def tell(self, worker_id: str, item: Replica) -> None:
        self.sequence[worker_id] += 1
        self.apply(self.core.replica_event(worker_id, self.sequence[worker_id], item, self.now))

    @precondition(lambda self: any(self.workers.values()))
    @rule(data=st.data(), fails=RARELY)
    def a_replica_moves_on(self, data: st.DataObject, fails: bool) -> None:
        items = [item for held in self.workers.values() for item in held.values()]
        item = data.draw(st.sampled_from(sorted(items, key=lambda item: item.replica_id)))
        if fails:
            del self.workers[item.worker_id][item.replica_id]
            changed = replica(item.replica_id, model=item.model, state=ReplicaState.FAILED, worker_id=item.worker_id)
            self.tell(item.worker_id, changed)
        elif item.state is not ReplicaState.ASLEEP:
            self.become_ready(item)

    def become_ready(self, item: Replica) -> None:
        self.next_port += 1
        address = item.address or f"127.0.0.1:{self.next_port}"
        changed = replace(item, state=ReplicaState.READY, address=address, can_sleep=item.model == "c")
        self.workers[item.worker_id][item.replica_id] = changed
        self.tell(item.worker_id, changed)

    @rule()
    def envoy_acknowledges(self) -> None:
        self.published = self.core.fleet.endpoints()
        self.apply(self.core.endpoints_acknowledged(self.published, self.now))

    @rule()
    def all_goes_well_for_a_while(self) -> None:
        while self.inbox:
            self.obey(refuses=False)
        for held in self.workers.values():
            for item in list(held.values()):
                if item.state.is_starting:
                    self.become_ready(item)
        self.envoy_acknowledges()

    @rule(model=st.sampled_from("abc"), seconds=st.sampled_from([0.0, 5.0, 60.0, 300.0]))
    def request(self, model: str, seconds: float) -> None:
        self.next_request += 1
        request_id = f"q{self.next_request}"
        pick = self.core.pick(entry(model), request_id, self.now)
        if pick is not None:
            self.check_pick(pick.endpoints)
            return
        try:
            hold, todo = self.core.hold(
                entry(model), request_id, size_bytes=1, deadline=self.now + seconds, now=self.now
            )
        except (Overloaded, HoldExpired) as error:
            assert error.retry_after_seconds is not None  # noqa: PT017 (refusing is right, too)
            return
        self.waiting[hold.hold_id] = hold
        self.apply(todo)

    @rule(model=st.sampled_from("abc"))
    def operator_drains(self, model: str) -> None:
        self.apply(self.core.drain_model(entry(model), self.now))

    @precondition(lambda self: self.waiting)
    @rule()
    def client_leaves(self) -> None:
        hold = self.waiting.pop(next(iter(self.waiting)))
        self.core.cancel_hold(hold)

    @precondition(lambda self: any(self.workers.values()))
    @rule(data=st.data(), code=st.sampled_from([0, 14]))
    def report(self, data: st.DataObject, code: int) -> None:
        items = [item for held in self.workers.values() for item in held.values()]
        item = data.draw(st.sampled_from(sorted(items, key=lambda item: item.replica_id)))
        started = tuple(f"q{number}" for number in range(max(0, self.next_request - 3), self.next_request))
        delta = LoadDelta(item.replica_id, Load(), started, tuple((request, code) for request in started))
        self.apply(self.core.load_report([delta], self.now))

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 3.0, 10.0, 45.0]), is_silent=RARELY)
    def time_passes(self, seconds: float, is_silent: bool) -> None:
        self.now += seconds
        if not is_silent:
            for worker_id in self.workers:
                if worker_id in self.connected:
                    self.apply(self.core.worker_seen(worker_id, self.now))
        self.apply(self.core.expire_holds(self.now))
        self.apply(self.core.tick(self.now))

    @invariant()
    def test_every_hold_is_accounted_for(self) -> None:
        held = {
            hold.hold_id for model in self.core.holds.models() for hold in self.core.holds._by_model[model].values()
        }
        assert held == set(self.waiting)

    @invariant()
    def test_nobody_waits_while_a_replica_could_take_the_request(self) -> None:
        for model in self.core.holds.models():
            assert self.core.traffic.table.snapshot(model, "sha256:1") == ()

    @invariant()
    def test_an_asleep_replica_is_never_picked(self) -> None:
        for item in self.core.fleet.replicas():
            if item.state in (ReplicaState.ASLEEP, ReplicaState.WAKING):
                assert not self.core.traffic.is_candidate(item.replica_id)
                assert item.address not in self.core.fleet.endpoints()

    @invariant()
    def test_a_model_has_at_most_one_start_under_way(self) -> None:
        for model in "abc":
            replicas = self.core.fleet.replicas_of(model)
            starting = [r for r in replicas if r.state.is_starting and not self.core.traffic.is_draining(r)]
            assert len(starting) <= 1 + sum(1 for r in starting if r.worker_id not in self.reachable())

    def reachable(self) -> set[str]:
        return {worker.hello.worker_id for worker in self.core.fleet.workers() if worker.is_reachable}

    @invariant()
    def test_the_table_holds_exactly_the_eligible_replicas(self) -> None:
        traffic = self.core.traffic
        eligible = {r.replica_id for r in self.core.fleet.replicas() if traffic.excluded(r) is None}
        assert {candidate.replica_id for candidate in traffic.table} == eligible
        assert list(self.core.fleet.check()) == []


TestLedger = LedgerMachine.TestCase
TestHolds = HoldsMachine.TestCase
TestActivation = ActivationMachine.TestCase
TestBreaker = BreakerMachine.TestCase
TestFleet = FleetMachine.TestCase
TestCore = CoreMachine.TestCase
