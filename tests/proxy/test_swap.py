"""From eager to compiled: what is ordered when, what counts, what gives way, and what a failure leads to."""

import json
from dataclasses import replace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from helios.proxy import actions
from helios.proxy.activation.machine import ActivationState
from helios.proxy.catalogue import ModelEntry
from helios.proxy.core import Core, CorePolicy
from helios.proxy.engine_needs import needs_of, with_form
from helios.proxy.fleet.commands import Command, DrainReplica, Order, StartReplica, StopReplica
from helios.proxy.fleet.state import Form, Load, Replica, ReplicaState
from helios.proxy.lifecycle import asked_replica
from helios.proxy.swap import SwapPolicy
from helios.proxy.traffic import LoadDelta
from tests.proxy.support import GIB, MIB, counter, entry, hello, policy

S = ReplicaState
BOTH = json.dumps({"compilation": "COMPILATION_MODE_EAGER_THEN_COMPILED"})
SWAP = SwapPolicy(after_seconds=20, recent_seconds=60, overlap_seconds=2, back_off_seconds=60, start_seconds=2000)


def both(name: str = "m", **changes: object) -> ModelEntry:
    return replace(entry(name, engine_settings=BOTH), **changes)  # type: ignore[arg-type]


def swap_policy(idle_seconds: float = 900.0) -> CorePolicy:
    base = policy(idle_seconds=idle_seconds, residency_seconds=1.0)
    return replace(base, lifecycle=replace(base.lifecycle, swap=SWAP))


class World:
    """A core with one worker, whose replicas do as they are told, and an Envoy that acknowledges when told to."""

    def __init__(self, *models: ModelEntry, memory_bytes: int = 8 * GIB, idle_seconds: float = 900.0) -> None:
        self.policy = swap_policy(idle_seconds)
        self.models = models or (both(),)
        self.memory_bytes = memory_bytes
        self.now = 0.0
        self.replicas: dict[str, Replica] = {}
        self.settings: dict[str, str] = {}
        self.orders: list[Order] = []
        self.reports: list[actions.Action] = []
        self.released: list[str] = []
        self.sequence = 0
        self.requests = 0
        self.new_id = counter()
        self.restart()

    def restart(self) -> None:
        """A new proxy, to which the worker says hello."""
        self.core = Core(self.policy, new_id=self.new_id, known_workers=(), now=self.now)
        self.apply(self.core.models_replaced(self.models, self.now, is_synced=True))
        self.sequence = 0
        told = hello(replicas=tuple(self.replicas.values()), memory_bytes=self.memory_bytes, incarnation=str(self.now))
        self.apply(self.core.worker_hello(told, self.now))

    def apply(self, todo: list[actions.Action]) -> None:
        for action in todo:
            match action:
                case actions.Send(command):
                    self.orders.append(command.order)
                    self.obey(command)
                case actions.Release(hold, _):
                    self.released.append(hold.request_id)
                case _:
                    self.reports.append(action)

    def obey(self, command: Command) -> None:
        match command.order:
            case StartReplica() as order:
                item = replace(asked_replica("w", order), state=S.LOADING, engine="vllm")
                self.settings[order.replica_id] = order.engine_settings
                self.tell(item)
            case DrainReplica(replica_id, seconds) if replica_id in self.replicas:
                if seconds == SWAP.drain_seconds:
                    self.check_swap(self.replicas[replica_id])
                self.tell(replace(self.replicas[replica_id], state=S.DRAINING))
            case StopReplica(replica_id) if replica_id in self.replicas:
                self.tell(replace(self.replicas[replica_id], state=S.DRAINING))
                self.tell(replace(self.replicas[replica_id], state=S.STOPPED))
        self.apply(self.core.command_acknowledged("w", command.command_id, refused_reason="", message="", now=self.now))

    def check_swap(self, drained: Replica) -> None:
        """An eager replica gives its place to nothing but a compiled one that takes requests."""
        assert drained.form is Form.EAGER
        candidates = [one for one in self.replicas.values() if self.core.traffic.is_candidate(one.replica_id)]
        assert any(one.form is Form.COMPILED for one in candidates)

    def tell(self, item: Replica) -> None:
        self.sequence += 1
        self.replicas[item.replica_id] = item
        if item.state.is_gone:
            del self.replicas[item.replica_id]
        self.apply(self.core.replica_event("w", self.sequence, item, self.now))

    def become_ready(self, item: Replica, *, is_acknowledged: bool = True) -> Replica:
        changed = replace(item, state=S.READY, address=f"127.0.0.1:{1000 + len(self.settings)}")
        self.tell(changed)
        if is_acknowledged:
            self.acknowledge()
        return changed

    def acknowledge(self) -> None:
        self.apply(self.core.endpoints_acknowledged(self.core.fleet.endpoints(), self.now))

    def fail(self, item: Replica, reason: str = "ENGINE_START_FAILED") -> None:
        self.end(replace(item, state=S.FAILED, failure_reason=reason, failure_message="no compiler"))

    def end(self, ended: Replica) -> None:
        """A replica ends as a worker tells of it: draining until its last process is gone."""
        self.tell(replace(ended, state=S.DRAINING))
        self.pass_time(0.1)
        self.tell(ended)

    def ask(self, model: str = "m") -> str:
        """One request: the replica that it is sent to and that ends it at once, or empty where it is held."""
        self.requests += 1
        request_id = f"q{self.requests}"
        known = next(one for one in self.models if one.name == model)
        pick = self.core.pick(known, request_id, self.now)
        if pick is None:
            _, todo = self.core.hold(known, request_id, size_bytes=0, deadline=self.now + 300, now=self.now)
            self.apply(todo)
            return ""
        replica_id = pick.choices[0].replica_id
        self.apply(self.core.load_report([LoadDelta(replica_id, Load(), (request_id,), ((request_id, 0),))], self.now))
        return replica_id

    def pass_time(self, seconds: float, *, is_used: bool = False) -> None:
        """Time in steps of a second, as the runtime lets it pass."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + 1)
            if is_used:
                self.ask()
            self.apply(self.core.worker_seen("w", self.now))
            self.apply(self.core.tick(self.now))

    def starts(self) -> list[StartReplica]:
        return [order for order in self.orders if isinstance(order, StartReplica)]

    def spare(self) -> Replica:
        (found,) = [item for item in self.replicas.values() if item.is_spare]
        return found

    def eager(self) -> Replica:
        (found,) = [item for item in self.replicas.values() if item.form is Form.EAGER]
        return found

    def serve(self) -> Replica:
        """Brings the model up and uses it until a compiled replica is on its way; returns that."""
        self.ask()
        self.become_ready(self.eager())
        self.pass_time(SWAP.after_seconds + 1, is_used=True)
        return self.spare()

    def of(self, kind: type[actions.Action]) -> list[actions.Action]:
        return [action for action in self.reports if isinstance(action, kind)]


def test_a_request_at_zero_starts_an_eager_replica_and_lasting_use_orders_a_compiled_one_in_the_background() -> None:
    world = World()
    world.ask()
    (first,) = world.starts()
    assert json.loads(first.engine_settings) == {"compilation": "COMPILATION_MODE_EAGER"}
    assert not first.is_background
    world.become_ready(world.eager())
    assert world.released == ["q1"]
    world.pass_time(SWAP.after_seconds - 1, is_used=True)
    assert len(world.starts()) == 1
    world.pass_time(60, is_used=True)
    (_, second) = world.starts()
    assert json.loads(second.engine_settings) == {"compilation": "COMPILATION_MODE_COMPILED"}
    assert second.is_background
    # Nobody asked for it: neither a trace nor a time of a request.
    assert (second.traceparent, second.requested_at) == ("", 0.0)


def test_a_few_requests_at_the_start_are_no_reason_to_compile() -> None:
    world = World()
    world.ask()
    world.become_ready(world.eager())
    world.pass_time(SWAP.after_seconds - 5, is_used=True)
    world.pass_time(600)
    assert len(world.starts()) == 1


def test_where_a_compiled_start_is_known_to_be_short_it_is_ordered_after_as_short_a_use() -> None:
    world = World()
    compiled = world.become_ready(world.serve())
    world.core.lifecycle.drain_all("m", world.now)
    world.apply(world.core.tick(world.now))
    for item in list(world.replicas.values()):
        world.tell(replace(item, state=S.STOPPED))
    world.ask()
    world.become_ready(world.eager())
    world.pass_time(3, is_used=True)
    assert world.spare().replica_id != compiled.replica_id


def test_a_model_that_is_kept_is_compiled_without_being_used() -> None:
    world = World(both(min_replicas=1))
    world.become_ready(world.eager())
    world.pass_time(SWAP.after_seconds + 1)
    assert world.spare().form is Form.COMPILED


def test_the_compiled_one_is_not_sent_requests_before_envoy_knows_it_and_then_takes_over() -> None:
    world = World()
    spare, eager = world.serve(), world.eager()
    world.pass_time(100, is_used=True)
    assert world.core.traffic.exclusions("m") == ((spare.replica_id, "compiling"),)
    world.become_ready(spare, is_acknowledged=False)
    world.pass_time(30, is_used=True)
    assert world.ask() == eager.replica_id, "Envoy does not know the other one"
    world.acknowledge()
    assert world.eager().state is S.READY
    world.pass_time(SWAP.overlap_seconds, is_used=True)
    world.pass_time(1)
    drains = [order for order in world.orders if isinstance(order, DrainReplica)]
    assert drains == [DrainReplica(eager.replica_id, SWAP.drain_seconds)]
    assert world.ask() == spare.replica_id
    world.tell(replace(world.eager(), state=S.STOPPED))
    world.pass_time(300, is_used=True)
    assert len(world.starts()) == 2, "one swap, and nothing after it"
    assert [type(action) for action in world.reports if type(action).__name__.startswith("Swap")] == [
        actions.SwapBegun,
        actions.SwapReady,
        actions.SwapDone,
    ]


def test_both_are_picked_for_a_while_so_that_whoever_is_refused_has_another_one_to_go_to() -> None:
    world = World()
    compiled = world.become_ready(world.serve())
    chosen = world.core.pick(both(), "last", world.now)
    assert chosen is not None
    assert {choice.replica_id for choice in chosen.choices} == {world.eager().replica_id, compiled.replica_id}
    world.pass_time(1, is_used=True)
    assert world.eager().state is S.READY


def test_a_compiled_one_whose_breaker_opens_before_it_took_over_replaces_nothing() -> None:
    world = World()
    compiled, eager = world.become_ready(world.serve()), world.eager()
    failed = tuple((f"f{number}", 13) for number in range(3))
    world.apply(world.core.load_report([LoadDelta(compiled.replica_id, Load(), (), failed)], world.now))
    assert not world.core.traffic.is_candidate(compiled.replica_id)
    world.tell(world.replicas[eager.replica_id])
    world.apply(world.core.tick(world.now))
    assert world.eager().state is S.READY
    assert world.ask() == eager.replica_id


def test_what_is_drained_in_favour_of_another_keeps_its_time_when_its_worker_restarts() -> None:
    world = World()
    world.become_ready(world.serve())
    eager = world.eager()
    world.pass_time(4, is_used=True)
    assert world.eager().state is S.DRAINING
    # The worker's restart lost the order.
    others = tuple(item for item in world.replicas.values() if item.replica_id != eager.replica_id)
    told = hello(replicas=(replace(eager, state=S.READY), *others), memory_bytes=8 * GIB, incarnation="again")
    world.apply(world.core.worker_hello(told, world.now))
    assert world.orders[-1] == DrainReplica(eager.replica_id, SWAP.drain_seconds)


def test_a_model_that_goes_idle_stops_its_compile() -> None:
    world = World(idle_seconds=100.0)
    spare = world.serve()
    world.pass_time(110)
    assert StopReplica(spare.replica_id) in world.orders
    assert not [item for item in world.replicas.values() if item.state is not S.DRAINING]
    (stopped,) = world.of(actions.SwapStopped)
    assert stopped == actions.SwapStopped("m", spare.replica_id, "the model is not used any more")


def test_a_compile_that_is_nearly_done_goes_on_though_the_model_is_idle() -> None:
    world = World(idle_seconds=100.0)
    spare = world.serve()
    world.pass_time(100, is_used=True)
    compiled = world.become_ready(spare)
    world.pass_time(4, is_used=True)
    world.tell(replace(world.eager(), state=S.STOPPED))
    world.fail(compiled, "ENGINE_DIED")
    world.ask()
    world.become_ready(world.eager())
    world.pass_time(SWAP.after_seconds + 70, is_used=True)
    again = world.spare()
    # A hundred seconds took the last one; eighty are over when the model has been idle for long enough.
    world.pass_time(101)
    assert again.replica_id in world.replicas
    world.pass_time(60)
    assert again.replica_id not in world.replicas, "it took longer than the last one by half"


def test_there_is_no_compile_where_it_would_take_the_room_of_others() -> None:
    world = World(both(), entry("idle"), memory_bytes=3 * GIB - MIB)
    world.tell(Replica("other", "idle", "sha256:1", S.READY, "w", "127.0.0.1:9", "vllm", memory_bytes=GIB))
    world.ask()
    world.become_ready(world.eager())
    world.pass_time(200, is_used=True)
    assert [order.model for order in world.starts()] == ["m"]
    assert "other" in world.replicas
    assert not [order for order in world.orders if isinstance(order, DrainReplica | StopReplica)]


@pytest.mark.parametrize("is_awaited", [True, False])
def test_a_compile_gives_way_to_any_start_that_needs_its_room(is_awaited: bool) -> None:
    world = World(both(), entry("cold"), memory_bytes=2 * 1100 * MIB)
    spare = world.serve()
    if is_awaited:
        world.ask("cold")
    else:
        # Its policy wants it; that it has been used is no reason to take an idle model's room.
        world.core.traffic.use("cold", world.now)
        world.core.lifecycle.reconcile("cold", world.now)
        world.apply(world.core.tick(world.now))
    world.pass_time(1, is_used=True)
    assert StopReplica(spare.replica_id) in world.orders
    assert [order.model for order in world.starts()] == ["m", "m", "cold"]
    assert world.eager().state is S.READY, "the one that serves stays"
    # While there is no room, it is not ordered again.
    world.pass_time(50, is_used=True)
    assert len(world.starts()) == 3


def test_a_compile_gives_way_to_the_eager_start_of_its_own_model() -> None:
    world = World(both(), entry("x", min_replicas=1), memory_bytes=3 * 1100 * MIB)
    world.become_ready(next(iter(world.replicas.values())))
    spare, eager = world.serve(), world.eager()
    # Something else came to the node, so that what the eager one leaves is not enough for its successor.
    world.tell(replace(world.replicas["id-1"], memory_bytes=1400 * MIB))
    world.fail(eager, "REPLICA_DIED")
    world.ask()
    world.pass_time(2)
    assert StopReplica(spare.replica_id) in world.orders
    assert world.eager().state is S.LOADING


def test_a_failed_compile_leaves_the_eager_one_and_is_tried_again_later_and_not_for_ever() -> None:
    world = World()
    world.fail(world.serve())
    (failed,) = world.of(actions.SwapFailed)
    assert failed == actions.SwapFailed("m", "ENGINE_START_FAILED", "no compiler", 60.0)
    assert world.ask() == world.eager().replica_id
    world.pass_time(58, is_used=True)
    assert len(world.starts()) == 2
    world.pass_time(3, is_used=True)
    world.fail(world.spare())
    world.pass_time(230, is_used=True)
    assert len(world.starts()) == 3
    world.pass_time(15, is_used=True)
    world.fail(world.spare())
    assert world.of(actions.SwapFailed)[-1] == actions.SwapFailed("m", "ENGINE_START_FAILED", "no compiler", 0.0)
    world.pass_time(5000, is_used=True)
    assert len(world.starts()) == 4
    assert world.eager().state is S.READY
    # Other settings are another compile.
    world.models = (both(engine_settings=json.dumps(json.loads(BOTH) | {"dtype": "float32"})),)
    world.apply(world.core.model_upserted(world.models[0], world.now))
    world.pass_time(1, is_used=True)
    assert json.loads(world.starts()[-1].engine_settings)["dtype"] == "float32"


def test_a_compile_that_gets_no_processors_is_tried_again_much_later_however_often() -> None:
    world = World()
    spare = world.serve()
    for _ in range(5):
        world.fail(spare, "START_TIMEOUT")
        world.pass_time(900, is_used=True)
        assert not [item for item in world.replicas.values() if item.is_spare]
        world.pass_time(100, is_used=True)
        spare = world.spare()
    # A worker that never gives up a start is not waited for.
    world.pass_time(SWAP.start_seconds + 2, is_used=True)
    assert StopReplica(spare.replica_id) in world.orders
    assert world.of(actions.SwapFailed)[-1] == actions.SwapFailed(
        "m", "START_TIMEOUT", "it was not ready after 2000 s", 960.0
    )


def test_compiled_code_that_dies_while_it_serves_counts_as_a_failure_too() -> None:
    world = World()
    compiled = world.become_ready(world.serve())
    world.pass_time(4, is_used=True)
    world.tell(replace(world.eager(), state=S.STOPPED))
    world.fail(compiled, "ENGINE_DIED")
    world.ask()
    world.become_ready(world.eager())
    assert len(world.of(actions.SwapFailed)) == 1
    world.pass_time(55, is_used=True)
    assert not [item for item in world.replicas.values() if item.is_spare]


def test_an_order_that_the_worker_has_no_room_for_is_not_repeated_every_second() -> None:
    world = World()
    world.ask()
    world.become_ready(world.eager())
    world.obey = lambda command: world.apply(
        world.core.command_acknowledged(
            "w", command.command_id, refused_reason="NO_CAPACITY", message="", now=world.now
        )
    )
    world.pass_time(SWAP.after_seconds + 50, is_used=True)
    assert len(world.starts()) == 2
    assert world.of(actions.SwapFailed) == []


def test_when_the_eager_one_dies_a_request_starts_another_one_beside_the_compile() -> None:
    world = World()
    spare = world.serve()
    world.fail(world.eager(), "REPLICA_DIED")
    assert world.ask() == ""
    eager = world.eager()
    assert (eager.state, len(world.starts())) == (S.LOADING, 3)
    assert spare.replica_id in world.replicas, "it goes on"
    # Whichever is ready first answers.
    world.become_ready(spare)
    assert world.released[-1] == f"q{world.requests}"
    world.pass_time(1)
    assert StopReplica(eager.replica_id) in world.orders, "what is not ready yet goes first"


@pytest.mark.parametrize("is_ready", [True, False])
def test_a_proxy_that_restarts_in_the_middle_goes_on_with_the_swap(is_ready: bool) -> None:
    world = World()
    spare = world.serve()
    if is_ready:
        spare = world.become_ready(spare, is_acknowledged=False)
    eager = world.eager()
    world.restart()
    world.pass_time(30)
    assert len(world.starts()) == 2
    world.acknowledge()
    assert world.ask() in (eager.replica_id, spare.replica_id)
    if not is_ready:
        world.become_ready(spare)
    world.pass_time(5, is_used=True)
    assert world.eager().state is S.DRAINING
    assert world.orders[-1] == DrainReplica(eager.replica_id, SWAP.drain_seconds)
    assert len(world.starts()) == 2


def test_other_settings_stop_a_compile_and_begin_another_one() -> None:
    world = World()
    spare = world.serve()
    changed = both(engine_settings=json.dumps(json.loads(BOTH) | {"max_running_requests": 4}))
    world.models = (changed,)
    world.apply(world.core.model_upserted(changed, world.now))
    world.pass_time(1, is_used=True)
    assert StopReplica(spare.replica_id) in world.orders
    world.pass_time(1, is_used=True)
    assert json.loads(world.settings[world.spare().replica_id])["max_running_requests"] == 4


def test_adapters_that_come_and_go_are_no_reason_to_compile_anew() -> None:
    document = json.loads(BOTH) | {"lora": {"max_rank": 16}}
    world = World(both(engine_settings=json.dumps(document)))
    spare = world.serve()
    document["lora"]["adapters"] = [{"name": "polite", "model": "polite"}]
    changed = both(engine_settings=json.dumps(document))
    adapter = replace(entry("polite"), base_model="m")
    world.models = (changed, adapter)
    for model in world.models:
        world.apply(world.core.model_upserted(model, world.now))
    world.pass_time(5)
    assert spare.replica_id in world.replicas
    assert len(world.starts()) == 2


def test_a_model_that_is_to_be_eager_alone_stops_its_compile_also_after_a_restart() -> None:
    world = World()
    spare = world.serve()
    world.models = (both(engine_settings=json.dumps({"compilation": "COMPILATION_MODE_EAGER"})),)
    world.restart()
    world.acknowledge()
    world.pass_time(2, is_used=True)
    assert StopReplica(spare.replica_id) in world.orders
    assert world.eager().state is S.READY


def test_another_revision_ends_both_and_begins_anew() -> None:
    world = World()
    spare, eager = world.serve(), world.eager()
    world.models = (both(revision="sha256:2"),)
    world.apply(world.core.model_upserted(world.models[0], world.now))
    assert StopReplica(spare.replica_id) in world.orders
    assert world.replicas[eager.replica_id].state is S.DRAINING
    assert world.starts()[-1].revision == "sha256:2"
    assert needs_of(world.starts()[-1].engine_settings).form is Form.EAGER


def test_several_replicas_are_replaced_one_at_a_time() -> None:
    world = World(both(min_replicas=3), memory_bytes=16 * GIB)
    while any(item.state is S.LOADING and not item.is_background for item in world.replicas.values()):
        starting = next(item for item in world.replicas.values() if item.state is S.LOADING)
        world.become_ready(starting)
        world.pass_time(1)
    assert len(world.replicas) == 3
    world.pass_time(SWAP.after_seconds)
    for count in (2, 1, 0):
        world.pass_time(SWAP.after_seconds)
        world.become_ready(world.spare())
        world.pass_time(4)
        draining = [item for item in world.replicas.values() if item.state is S.DRAINING]
        assert [item.form for item in draining] == [Form.EAGER]
        world.tell(replace(draining[0], state=S.STOPPED))
        forms = [item.form for item in world.replicas.values() if not item.is_spare]
        assert (forms.count(Form.EAGER), len(forms)) == (count, 3)
    world.pass_time(200)
    assert len(world.replicas) == 3


def test_a_pinned_eager_replica_is_nobodys_room_while_its_successor_compiles() -> None:
    world = World(both(min_replicas=1), entry("cold"), memory_bytes=2 * 1100 * MIB)
    eager = world.become_ready(world.eager())
    world.pass_time(SWAP.after_seconds + 1)
    spare = world.spare()
    world.ask("cold")
    assert StopReplica(spare.replica_id) in world.orders
    assert world.replicas[eager.replica_id].state is S.READY


def test_an_engine_that_does_not_compile_and_a_worker_that_names_no_form_are_left_alone() -> None:
    for changes in ({"engine": "transformers"}, {"form": Form.UNKNOWN}):
        world = World()
        world.ask()
        world.become_ready(replace(world.eager(), **changes))
        world.pass_time(200, is_used=True)
        assert len(world.starts()) == 1


def test_what_each_form_was_measured_to_hold_corrects_that_form_alone() -> None:
    world = World()
    compiled = world.become_ready(world.serve())
    items = (("KV_CACHE", 256 * MIB), ("OVERHEAD", 768 * MIB))
    before = world.core.lifecycle.room.size(both())
    world.tell(replace(compiled, memory_items=items, measured_bytes=3 * GIB))
    assert world.core.lifecycle.room.size(both()) == before
    worker = world.core.fleet.worker("w")
    assert worker is not None
    as_compiled = replace(both(), engine_settings=with_form(BOTH, Form.COMPILED))
    assert world.core.lifecycle.room.size_on(worker, as_compiled).memory_bytes > 3 * GIB
    # A proxy that did not order it knows its form from its worker.
    world.restart()
    world.tell(replace(compiled, memory_items=items, measured_bytes=3 * GIB))
    worker = world.core.fleet.worker("w")
    assert worker is not None
    assert world.core.lifecycle.room.size_on(worker, as_compiled).memory_bytes > 3 * GIB


class SwapMachine(RuleBasedStateMachine):
    """A model with both forms beside another one that wants its room, through whatever may happen to a swap."""

    RARELY = st.sampled_from([False] * 5 + [True])

    def __init__(self) -> None:
        super().__init__()
        self.world = World(both(), entry("cold"), memory_bytes=3 * GIB - MIB, idle_seconds=100.0)

    def pick(self, data: st.DataObject, *states: ReplicaState) -> Replica | None:
        found = sorted((r for r in self.world.replicas.values() if r.state in states), key=lambda r: r.replica_id)
        return data.draw(st.sampled_from(found)) if found else None

    @initialize(is_compiled=st.booleans())
    def begin(self, is_compiled: bool) -> None:
        compiled = self.world.serve()
        if is_compiled:
            self.world.become_ready(compiled)

    @rule(seconds=st.sampled_from([1, 5, 25]))
    def use(self, seconds: int) -> None:
        for _ in range(seconds):
            if not self.world.core.holds.count("m"):
                self.world.ask()
            self.world.pass_time(1)

    @rule(seconds=st.sampled_from([3, 70, 110]), happens=RARELY)
    def rest(self, seconds: int, happens: bool) -> None:
        self.world.pass_time(seconds if happens else 1)

    @rule(data=st.data(), is_acknowledged=st.booleans())
    def a_start_succeeds(self, data: st.DataObject, is_acknowledged: bool) -> None:
        item = self.pick(data, S.LOADING)
        if item is not None:
            self.world.become_ready(item, is_acknowledged=is_acknowledged)

    @rule(data=st.data(), happens=RARELY)
    def a_replica_fails(self, data: st.DataObject, happens: bool) -> None:
        item = self.pick(data, S.LOADING, S.READY) if happens else None
        if item is not None:
            self.world.fail(item, "REPLICA_DIED")

    @rule(data=st.data())
    def a_drain_ends(self, data: st.DataObject) -> None:
        item = self.pick(data, S.DRAINING)
        if item is not None:
            self.world.tell(replace(item, state=S.STOPPED))

    @rule()
    def envoy_acknowledges(self) -> None:
        self.world.acknowledge()

    @rule(happens=RARELY)
    def somebody_asks_for_the_other_model(self, happens: bool) -> None:
        if happens and not self.world.core.holds.count("cold"):
            self.world.ask("cold")

    @rule(happens=RARELY)
    def the_proxy_restarts(self, happens: bool) -> None:
        if happens:
            self.world.restart()

    @rule(
        happens=RARELY, compilation=st.sampled_from(["EAGER", "EAGER_THEN_COMPILED"]), tokens=st.sampled_from([64, 65])
    )
    def settings_change(self, happens: bool, compilation: str, tokens: int) -> None:
        if happens:
            document = {"compilation": f"COMPILATION_MODE_{compilation}", "max_batched_tokens": tokens}
            changed = both(engine_settings=json.dumps(document))
            self.world.models = (changed, entry("cold"))
            self.world.apply(self.world.core.model_upserted(changed, self.world.now))

    def going(self) -> list[Replica]:
        is_draining = self.world.core.traffic.is_draining
        return [item for item in self.world.core.fleet.replicas_of("m") if not is_draining(item)]

    @invariant()
    def test_a_model_has_at_most_one_spare(self) -> None:
        assert sum(item.is_spare for item in self.going()) <= 1

    @invariant()
    def test_requests_never_wait_for_a_spare_alone(self) -> None:
        if self.world.core.holds.count("m"):
            activation = self.world.core.lifecycle.activation("m")
            awaited = self.world.core.fleet.replica(activation.replica_id or "")
            assert awaited is None or not awaited.is_spare
            is_known_soon = any(item.state is S.READY for item in self.going())
            assert is_known_soon or activation.state in (ActivationState.STARTING, ActivationState.WAITING)

    @invariant()
    def test_a_spare_is_never_picked(self) -> None:
        assert not any(item.is_spare and self.world.core.traffic.is_candidate(item.replica_id) for item in self.going())


TestSwap = SwapMachine.TestCase
