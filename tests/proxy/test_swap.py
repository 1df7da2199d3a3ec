"""From eager to compiled: what is ordered when, what counts, what gives way, and what a failure leads to."""

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from helios.api.engine.v1 import engine_settings_pb2
from helios.mesh.transfer.progress import TransferProgress
from helios.proxy import actions
from helios.proxy.activation.turns import TurnPolicy
from helios.proxy.engine_needs import needs_of, with_form
from helios.proxy.fleet.commands import Command, DrainReplica, StopReplica
from helios.proxy.fleet.state import Form, Load, Replica
from helios.proxy.fleet.wire import command_to_proto, replica_from_proto, replica_to_proto
from helios.proxy.swap import SwapFailures
from helios.proxy.traffic import LoadDelta
from tests.proxy.support import GIB, MIB, entry, hello
from tests.proxy.swap_world import BOTH, SWAP, S, SwapWorld, both


def test_a_request_at_zero_starts_an_eager_replica_and_lasting_use_orders_a_compiled_one_in_the_background() -> None:
    world = SwapWorld()
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
    world = SwapWorld()
    world.ask()
    world.become_ready(world.eager())
    world.pass_time(SWAP.after_seconds - 5, is_used=True)
    world.pass_time(600)
    assert len(world.starts()) == 1


def test_where_a_compiled_start_is_known_to_be_short_it_is_ordered_after_as_short_a_use() -> None:
    world = SwapWorld()
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
    world = SwapWorld(both(min_replicas=1))
    world.become_ready(world.eager())
    world.pass_time(SWAP.after_seconds + 1)
    assert world.spare().form is Form.COMPILED


def test_the_compiled_one_is_not_sent_requests_before_envoy_knows_it_and_then_takes_over() -> None:
    world = SwapWorld()
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
    world = SwapWorld()
    compiled = world.become_ready(world.serve())
    chosen = world.core.pick(both(), "last", world.now)
    assert chosen is not None
    assert {choice.replica_id for choice in chosen.choices} == {world.eager().replica_id, compiled.replica_id}
    world.pass_time(1, is_used=True)
    assert world.eager().state is S.READY


def test_a_compiled_one_whose_breaker_opens_before_it_took_over_replaces_nothing() -> None:
    world = SwapWorld()
    compiled, eager = world.become_ready(world.serve()), world.eager()
    failed = tuple((f"f{number}", 13) for number in range(3))
    world.apply(world.core.load_report([LoadDelta(compiled.replica_id, Load(), (), failed)], world.now))
    assert not world.core.traffic.is_candidate(compiled.replica_id)
    world.tell(world.replicas[eager.replica_id])
    world.apply(world.core.tick(world.now))
    assert world.eager().state is S.READY
    assert world.ask() == eager.replica_id


def test_what_is_drained_in_favour_of_another_keeps_its_time_when_its_worker_restarts() -> None:
    world = SwapWorld()
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
    world = SwapWorld(idle_seconds=100.0)
    spare = world.serve()
    world.pass_time(110)
    assert StopReplica(spare.replica_id) in world.orders
    assert not [item for item in world.replicas.values() if item.state is not S.DRAINING]
    (stopped,) = world.of(actions.SwapStopped)
    assert stopped == actions.SwapStopped("m", spare.replica_id, "the model is not used any more")


def test_a_compile_that_is_nearly_done_goes_on_though_the_model_is_idle() -> None:
    world = SwapWorld(idle_seconds=100.0)
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
    world = SwapWorld(both(), entry("idle"), memory_bytes=3 * GIB - MIB)
    world.tell(Replica("other", "idle", "sha256:1", S.READY, "w", "127.0.0.1:9", "vllm", memory_bytes=GIB))
    world.ask()
    world.become_ready(world.eager())
    world.pass_time(200, is_used=True)
    assert [order.model for order in world.starts()] == ["m"]
    assert "other" in world.replicas
    assert not [order for order in world.orders if isinstance(order, DrainReplica | StopReplica)]


@pytest.mark.parametrize("is_awaited", [True, False])
def test_a_compile_gives_way_to_any_start_that_needs_its_room(is_awaited: bool) -> None:
    world = SwapWorld(both(), entry("cold"), memory_bytes=2 * 1100 * MIB)
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
    world = SwapWorld(both(), entry("x", min_replicas=1), memory_bytes=3 * 1100 * MIB)
    world.become_ready(next(iter(world.replicas.values())))
    spare, eager = world.serve(), world.eager()
    # Something else came to the node, so that what the eager one leaves is not enough for its successor.
    world.tell(replace(world.replicas["id-1"], memory_bytes=1400 * MIB))
    world.fail(eager, "REPLICA_DIED")
    world.ask()
    world.pass_time(2)
    assert StopReplica(spare.replica_id) in world.orders
    assert world.eager().state is S.LOADING


@pytest.mark.parametrize("is_other_idle", [True, False])
def test_a_start_does_not_wait_for_the_long_drain_of_what_was_replaced_while_another_model_is_idle(
    is_other_idle: bool,
) -> None:
    world = SwapWorld(both(), entry("other"), entry("cold"), memory_bytes=3 * 1100 * MIB)
    world.ask("other")
    other = world.become_ready(next(iter(world.replicas.values())))
    compiled, eager = world.serve(), world.eager()
    for busy in (eager, compiled) if is_other_idle else (eager, compiled, other):
        delta = LoadDelta(busy.replica_id, Load(running_count=1), (f"long {busy.replica_id}",))
        world.apply(world.core.load_report([delta], world.now))
    world.become_ready(compiled)
    world.pass_time(4, is_used=True)
    assert world.replicas[eager.replica_id].state is S.DRAINING
    world.ask("cold")
    world.pass_time(1)
    drained = [(order.replica_id, order.timeout_seconds) for order in world.orders if isinstance(order, DrainReplica)]
    # Where nobody else gives way, it has as long as whatever gives way to somebody who waits.
    late = (other.replica_id, 30) if is_other_idle else (eager.replica_id, TurnPolicy().drain_seconds)
    assert drained == [(eager.replica_id, SWAP.drain_seconds), late]
    # The request waits for whichever ends.
    left = world.replicas[other.replica_id if is_other_idle else eager.replica_id]
    world.tell(replace(left, state=S.STOPPED))
    assert world.starts()[-1].model == "cold"


def test_a_failed_compile_leaves_the_eager_one_and_is_tried_again_later_and_not_for_ever() -> None:
    world = SwapWorld()
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
    world = SwapWorld()
    spare = world.serve()
    for _ in range(5):
        world.fail(spare, "START_TIMEOUT")
        world.pass_time(900, is_used=True)
        assert not [item for item in world.replicas.values() if item.is_spare]
        world.pass_time(100, is_used=True)
        spare = world.spare()
    # A worker that never gives up a start is not waited for.
    seconds = SWAP.start_seconds + spare.memory_bytes / (64 << 20)
    world.pass_time(seconds + 2, is_used=True)
    assert StopReplica(spare.replica_id) in world.orders
    assert world.of(actions.SwapFailed)[-1] == actions.SwapFailed(
        "m", "START_TIMEOUT", f"it was not ready after {seconds:.0f} s", 960.0
    )


@pytest.mark.parametrize(("form", "seconds"), [(Form.EAGER, 300), (Form.COMPILED, SWAP.start_seconds)])
def test_a_start_that_is_waited_for_has_the_time_of_a_compile_where_it_compiles(form: Form, seconds: float) -> None:
    world = SwapWorld(both(engine_settings=json.dumps({"compilation": f"COMPILATION_MODE_{form.name}"})))
    world.ask()
    (start,) = world.starts()
    # What it loads takes its time, too.
    world.pass_time(seconds + start.memory_bytes / (64 << 20) - 1)
    assert not [order for order in world.orders if isinstance(order, StopReplica)]
    world.pass_time(3)
    assert StopReplica("id-1") in world.orders


def test_compiled_code_that_dies_while_it_serves_counts_as_a_failure_too() -> None:
    world = SwapWorld()
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
    world = SwapWorld()
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
    world = SwapWorld()
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
    world = SwapWorld()
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


def fail_for_good(world: SwapWorld) -> None:
    """Uses a model until its compiled replica has failed as often as it is tried."""
    world.fail(world.serve())
    for _ in range(SWAP.attempt_count - 1):
        world.pass_time(SWAP.back_off_seconds * 5, is_used=True)
        world.fail(world.spare())
    world.pass_time(SWAP.back_off_seconds * 20, is_used=True)
    assert len(world.starts()) == 1 + SWAP.attempt_count


def used_after_a_restart(world: SwapWorld, remembered: Sequence[SwapFailures], incarnation: str) -> int:
    """Returns how many replicas are ordered after a restart, though the model is served."""
    before = len(world.starts())
    world.restart(remembered, incarnation=incarnation)
    world.acknowledge()
    world.pass_time(SWAP.back_off_seconds * 20, is_used=True)
    return len(world.starts()) - before


def test_what_can_not_be_compiled_is_remembered_over_a_restart_of_the_proxy() -> None:
    world = SwapWorld()
    fail_for_good(world)
    assert world.of(actions.SwapFailuresChanged)
    remembered, incarnation = world.core.lifecycle.swaps.failures, world.incarnation
    assert [(one.model, one.failure_count) for one in remembered] == [("m", SWAP.attempt_count)]
    assert used_after_a_restart(world, remembered, incarnation) == 0
    # Nothing that was counted is lost by the next restart either.
    assert world.core.lifecycle.swaps.failures == remembered
    assert used_after_a_restart(world, [], incarnation) == 1


def test_failures_count_on_after_a_restart_of_the_proxy() -> None:
    world = SwapWorld()
    world.fail(world.serve())
    world.restart(world.core.lifecycle.swaps.failures, incarnation=world.incarnation)
    world.acknowledge()
    for _ in range(SWAP.attempt_count - 1):
        world.pass_time(SWAP.back_off_seconds * 5, is_used=True)
        world.fail(world.spare())
    world.pass_time(SWAP.back_off_seconds * 20, is_used=True)
    assert len(world.starts()) == 1 + SWAP.attempt_count


def test_a_worker_that_runs_anew_may_have_a_compiler() -> None:
    world = SwapWorld()
    fail_for_good(world)
    remembered = world.core.lifecycle.swaps.failures
    assert used_after_a_restart(world, remembered, "upgraded") == 1
    assert world.core.lifecycle.swaps.failures == ()
    # Also where the proxy lives on.
    world = SwapWorld()
    fail_for_good(world)
    world.greet("upgraded")
    world.acknowledge()
    world.pass_time(SWAP.after_seconds * 2, is_used=True)
    assert len(world.starts()) == 2 + SWAP.attempt_count


def test_other_settings_and_another_model_of_the_name_are_not_what_failed() -> None:
    for changes in ({"engine_settings": json.dumps(json.loads(BOTH) | {"max_running_requests": 4})}, {}):
        world = SwapWorld()
        fail_for_good(world)
        if changes:
            changed = both(**changes)
            world.models = (changed,)
            world.apply(world.core.model_upserted(changed, world.now))
        else:
            world.apply(world.core.model_deleted("m", world.now))
        assert world.core.lifecycle.swaps.failures == ()
        assert isinstance(world.of(actions.SwapFailuresChanged)[-1], actions.SwapFailuresChanged)


def test_other_settings_stop_a_compile_and_begin_another_one() -> None:
    world = SwapWorld()
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
    world = SwapWorld(both(engine_settings=json.dumps(document)))
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
    world = SwapWorld()
    spare = world.serve()
    world.models = (both(engine_settings=json.dumps({"compilation": "COMPILATION_MODE_EAGER"})),)
    world.restart()
    world.acknowledge()
    world.pass_time(2, is_used=True)
    assert StopReplica(spare.replica_id) in world.orders
    assert world.eager().state is S.READY


def test_another_revision_ends_both_and_begins_anew() -> None:
    world = SwapWorld()
    spare, eager = world.serve(), world.eager()
    world.models = (both(revision="sha256:2"),)
    world.apply(world.core.model_upserted(world.models[0], world.now))
    assert StopReplica(spare.replica_id) in world.orders
    assert world.replicas[eager.replica_id].state is S.DRAINING
    assert world.starts()[-1].revision == "sha256:2"
    assert needs_of(world.starts()[-1].engine_settings).form is Form.EAGER


def test_several_replicas_are_replaced_one_at_a_time() -> None:
    world = SwapWorld(both(min_replicas=3), memory_bytes=16 * GIB)
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
    world = SwapWorld(both(min_replicas=1), entry("cold"), memory_bytes=2 * 1100 * MIB)
    eager = world.become_ready(world.eager())
    world.pass_time(SWAP.after_seconds + 1)
    spare = world.spare()
    world.ask("cold")
    assert StopReplica(spare.replica_id) in world.orders
    assert world.replicas[eager.replica_id].state is S.READY


def test_an_engine_that_does_not_compile_and_a_worker_that_names_no_form_are_left_alone() -> None:
    for changes in ({"engine": "transformers"}, {"form": Form.UNKNOWN}):
        world = SwapWorld()
        world.ask()
        world.become_ready(replace(world.eager(), **changes))
        world.pass_time(200, is_used=True)
        assert len(world.starts()) == 1


def test_what_each_form_was_measured_to_hold_corrects_that_form_alone() -> None:
    world = SwapWorld()
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


@pytest.mark.parametrize("remaining_seconds", [None, 5_000.0])
def test_a_fetch_survives_the_wire(remaining_seconds: float | None) -> None:
    fetch = TransferProgress(10, 1_000_000_000, 80.0, remaining_seconds)
    item = Replica("r", "m", "sha256:1", S.FETCHING, "w", fetch=fetch)
    assert replica_from_proto(replica_to_proto(item), "w") == item


@pytest.mark.parametrize("form", list(Form))
def test_the_form_of_a_replica_and_an_order_in_the_background_survive_the_wire(form: Form) -> None:
    item = Replica("r", "m", "sha256:1", S.READY, "w", form=form, is_background=True)
    assert replica_from_proto(replica_to_proto(item), "w") == item
    world = SwapWorld()
    world.serve()
    sent = command_to_proto(Command("c", "w", world.starts()[-1])).command.start
    assert sent.in_background
    assert sent.engine_settings.compilation == engine_settings_pb2.COMPILATION_MODE_COMPILED
