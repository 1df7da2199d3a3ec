"""LoRA adapters of replicas that run: what is ordered, where requests go meanwhile, what those are told who wait."""

from dataclasses import replace

import pytest

from helios.mesh.errors import ModelNotFound, NoReadyReplica, PreconditionFailed
from helios.proxy import actions
from helios.proxy.catalogue import ModelEntry
from helios.proxy.core import Core
from helios.proxy.fleet.commands import Command, EvictRevision, SetAdapters
from helios.proxy.fleet.state import Adapter, AdapterState, HeldAdapter, Replica
from helios.proxy.fleet.wire import command_to_proto, replica_from_proto, replica_to_proto
from tests.proxy.support import core, entry, hello, ready, replica
from tests.proxy.test_core import sent
from tests.proxy.test_engine_settings import settings

LOADED, LOADING, FAILED, UNLOADING = (
    AdapterState.LOADED,
    AdapterState.LOADING,
    AdapterState.FAILED,
    AdapterState.UNLOADING,
)


def base(*adapters: str) -> ModelEntry:
    said = [{"name": name, "model": f"{name}-lora"} for name in adapters]
    return entry(engine_settings=settings(lora={"adapters": said}) if adapters else "")


def lora(name: str, revision: str = "1") -> ModelEntry:
    return replace(entry(f"{name}-lora", revision=f"sha256:{name}{revision}"), base_model="x")


def adapter(name: str, revision: str = "1") -> Adapter:
    return Adapter(name, f"{name}-lora", f"sha256:{name}{revision}")


def holding(*held: tuple[Adapter, AdapterState], replica_id: str = "r", reason: str = "", words: str = "") -> Replica:
    has = tuple(HeldAdapter(one, state, *((reason, words) if state is FAILED else ())) for one, state in held)
    return replace(replica(replica_id, address=f"1:{replica_id}"), adapters=has)


def started(*replicas: Replica, adapters: tuple[str, ...] = ()) -> tuple[Core, list[object]]:
    """A core with one worker's replicas of a model, all published; and what it ordered."""
    subject = core()
    subject.models_replaced([base(*adapters), lora("pirate"), lora("poet")], 0.0, is_synced=True)
    todo = subject.worker_hello(hello(replicas=replicas), 0.0)
    todo += subject.endpoints_acknowledged(subject.fleet.endpoints(), 0.0)
    return subject, sent(todo)


def test_settings_that_gain_and_lose_adapters_hold_for_replicas_that_run() -> None:
    subject, orders = started(replica())
    assert orders == [], "no adapters, no orders"
    assert sent(subject.model_upserted(base("pirate"), 1.0)) == [SetAdapters("r", (adapter("pirate"),))]
    subject.replica_event("w", 1, holding((adapter("pirate"), LOADED)), 2.0)
    assert sent(subject.model_upserted(base("pirate", "poet"), 3.0)) == [
        SetAdapters("r", (adapter("pirate"), adapter("poet")))
    ]
    subject.replica_event("w", 2, holding((adapter("pirate"), LOADED), (adapter("poet"), LOADED)), 4.0)
    assert sent(subject.model_upserted(base("poet"), 5.0)) == [SetAdapters("r", (adapter("poet"),))]
    subject.replica_event("w", 3, holding((adapter("poet"), LOADED), (adapter("pirate"), UNLOADING)), 6.0)
    assert sent(subject.tick(60.0)) == [], "what is on its way out needs no order"
    assert sent(subject.model_upserted(base(), 61.0)) == [SetAdapters("r", ())]


def test_a_new_revision_of_an_adapter_is_ordered_at_once_and_the_old_one_answers_nobody() -> None:
    subject, _ = started(holding((adapter("pirate"), LOADED)), adapters=("pirate",))
    model = base("pirate")
    assert subject.pick(model, "q1", 1.0, "pirate") is not None
    assert sent(subject.model_upserted(lora("pirate", "2"), 2.0)) == [SetAdapters("r", (adapter("pirate", "2"),))]
    assert subject.pick(model, "q2", 2.0, "pirate") is None
    hold, _ = subject.hold(model, "q2", size_bytes=0, deadline=99.0, now=2.0, adapter="pirate")
    swapped = holding((adapter("pirate", "2"), LOADED), (adapter("pirate"), UNLOADING))
    (release,) = subject.replica_event("w", 1, swapped, 2.1)
    assert isinstance(release, actions.Release)
    assert release.hold == hold


def test_a_lost_order_is_repeated_and_one_that_is_under_way_is_not() -> None:
    subject, orders = started(replica(), adapters=("pirate",))
    assert orders == [SetAdapters("r", (adapter("pirate"),))]
    assert sent(subject.tick(1.0)) == []
    assert sent(subject.tick(4.9)) == []
    assert sent(subject.tick(5.1)) == [SetAdapters("r", (adapter("pirate"),))]
    subject.replica_event("w", 1, holding((adapter("pirate"), LOADING)), 6.0)
    assert sent(subject.tick(60.0)) == [], "the worker has it and goes on by itself"


def test_a_request_for_an_adapter_waits_for_a_replica_that_has_it_and_holds_up_nobody() -> None:
    subject, _ = started(replica("r", address="1:r"), replica("s", address="1:s"))
    model = base("pirate", "poet")
    subject.model_upserted(model, 1.0)
    assert subject.pick(model, "q1", 1.0, "pirate") is None
    pirate, _ = subject.hold(model, "q1", size_bytes=0, deadline=99.0, now=1.0, adapter="pirate")
    poet, _ = subject.hold(model, "q2", size_bytes=0, deadline=99.0, now=1.0, adapter="poet")
    assert subject.pick(model, "q3", 1.0) is not None, "a request for the model itself"
    done = subject.replica_event("w", 1, holding((adapter("poet"), LOADED), replica_id="s"), 2.0)
    released = [action for action in done if isinstance(action, actions.Release)]
    assert [(action.hold, action.pick.endpoints) for action in released] == [(poet, "1:s")]
    for number in range(20):
        chosen = subject.pick(model, f"p{number}", 3.0, "poet")
        assert chosen is not None
        assert chosen.endpoints == "1:s", "the other one has it not"
    assert [type(action) for action in subject.expire_holds(99.0)] == [actions.Fail]
    assert pirate.adapter == "pirate"
    assert subject.holds.lanes("m") == []
    unloaded = holding((adapter("poet"), UNLOADING), replica_id="s")
    subject.replica_event("w", 2, unloaded, 100.0)
    assert subject.pick(model, "q9", 100.0, "poet") is None


@pytest.mark.parametrize(
    ("reason", "kind", "status"),
    [("ADAPTER_RANK_TOO_LARGE", PreconditionFailed, 400), ("BLOB_NOT_FOUND", NoReadyReplica, 503)],
)
def test_an_adapter_that_no_replica_can_have_is_answered_with_the_reason(
    reason: str, kind: type[Exception], status: int
) -> None:
    subject, _ = started(holding(), adapters=("pirate", "poet"))
    model = base("pirate", "poet")
    hold, _ = subject.hold(model, "q1", size_bytes=0, deadline=99.0, now=1.0, adapter="pirate")
    waiting, _ = subject.hold(model, "q2", size_bytes=0, deadline=99.0, now=1.0, adapter="poet")
    said = holding((adapter("pirate"), FAILED), (adapter("poet"), LOADING), reason=reason, words="set lora.max_rank")
    (failed,) = [action for action in subject.replica_event("w", 1, said, 2.0) if isinstance(action, actions.Fail)]
    assert failed.hold == hold
    assert isinstance(failed.error, kind)
    assert failed.error.http_status == status
    assert "set lora.max_rank" in failed.error.message
    with pytest.raises(kind):
        subject.hold(model, "q3", size_bytes=0, deadline=99.0, now=3.0, adapter="pirate")
    assert subject.holds.next_of_lane("m", "poet") == [waiting]
    assert subject.pick(model, "q4", 3.0) is not None, "the model itself is not affected"
    # Where one replica has it, another one's failure is nobody's business.
    subject.replica_event("w", 2, holding((adapter("pirate"), LOADED), replica_id="s"), 4.0)
    subject.endpoints_acknowledged(subject.fleet.endpoints(), 4.0)
    assert subject.pick(model, "q5", 5.0, "pirate") is not None


@pytest.mark.parametrize("replicas", [(), (replica(),)], ids=["at zero", "while it runs"])
def test_who_waits_for_an_adapter_that_the_settings_lose_is_told_at_once(replicas: tuple[Replica, ...]) -> None:
    subject, _ = started(*replicas, adapters=("pirate",))
    hold, _ = subject.hold(base("pirate"), "q1", size_bytes=0, deadline=99.0, now=1.0, adapter="pirate")
    (failed,) = [action for action in subject.model_upserted(base(), 2.0) if isinstance(action, actions.Fail)]
    assert failed.hold == hold
    assert isinstance(failed.error, ModelNotFound), "what a request is told that comes now"
    assert subject.holds.lanes("m") == []


def test_a_worker_that_knows_no_such_order_is_no_reason_to_wait() -> None:
    subject, _ = started(replica())
    model = base("pirate")
    (order,) = [action for action in subject.model_upserted(model, 1.0) if isinstance(action, actions.Send)]
    hold, _ = subject.hold(model, "q1", size_bytes=0, deadline=99.0, now=1.0, adapter="pirate")
    done = subject.command_acknowledged(
        "w", order.command.command_id, refused_reason="UNKNOWN_COMMAND", message="of a newer version", now=2.0
    )
    (failed,) = [action for action in done if isinstance(action, actions.Fail)]
    assert failed.hold == hold
    assert failed.error.metadata["cause"] == "UNKNOWN_COMMAND"


def test_a_worker_that_comes_back_is_told_what_its_replicas_lack() -> None:
    subject, _ = started(holding((adapter("pirate"), LOADED)), adapters=("pirate", "poet"))
    subject.worker_lost("w", 1.0)
    again = hello(replicas=(holding((adapter("pirate"), LOADED)),), incarnation="2")
    orders = sent(subject.worker_hello(again, 10.0))
    assert SetAdapters("r", (adapter("pirate"), adapter("poet"))) in orders
    subject.endpoints_acknowledged(subject.fleet.endpoints(), 10.0)
    assert subject.pick(base("pirate", "poet"), "q1", 11.0, "pirate") is not None, "what it has answers meanwhile"


def test_bytes_of_an_adapter_stay_on_a_node_while_a_replica_has_it() -> None:
    subject, _ = started(holding((adapter("pirate"), LOADED)), adapters=("pirate",))
    subject.model_upserted(base(), 1.0)
    subject.replica_event("w", 1, holding((adapter("pirate"), UNLOADING)), 1.5)
    assert not [order for order in sent(subject.model_deleted("pirate-lora", 2.0)) if isinstance(order, EvictRevision)]
    subject.replica_event("w", 2, holding(), 3.0)
    assert EvictRevision("sha256:pirate1") in sent(subject.tick(4.0))


def test_adapters_travel_over_the_wire() -> None:
    held = holding((adapter("pirate"), FAILED), (adapter("poet"), LOADED), reason="BAD_ADAPTER", words="no")
    assert replica_from_proto(replica_to_proto(held), "w").adapters == held.adapters
    command = command_to_proto(Command("c", "w", SetAdapters("r", (adapter("poet"),)))).command
    (named,) = command.set_adapters.adapters
    assert (command.set_adapters.replica_id, named.name, named.model, named.revision) == (
        "r",
        "poet",
        "poet-lora",
        "sha256:poet1",
    )
    assert ready(held).adapters == held.adapters
