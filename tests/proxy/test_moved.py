"""Requests that wait while what they wait for is promoted, aborted, moved or deleted: who is told what."""

from collections.abc import Iterable
from dataclasses import replace

from helios.mesh.errors import HeliosError, ModelNotFound, NoReadyReplica, Overloaded
from helios.proxy import actions
from helios.proxy.admission.keyring import ANYBODY, Caller
from helios.proxy.core import Core
from helios.proxy.explain.journal import Journal, JournalLimits
from helios.proxy.explain.record import RequestState
from helios.proxy.fleet.commands import StartReplica
from helios.proxy.fleet.state import Load
from helios.proxy.holds import HoldLimits
from helios.proxy.traffic import LoadDelta
from tests.proxy.support import core, entry, hello, policy, replica

SERVED, CANARY = "sha256:" + "a" * 64, "sha256:" + "b" * 64
OWN = replace(entry(revision=SERVED), canary="m@" + "b" * 12, canary_percent=100)
OTHER = entry(OWN.canary, revision=CANARY, aliases=("m@next",))
BUSY, FREE = Load(running_count=64, waiting_count=40), Load(running_count=64)


def running(limits: HoldLimits | None = None) -> Core:
    """A model and its canary, with a replica each; the canary's is busy."""
    subject = core(policy(holds=limits))
    subject.models_replaced([OWN, OTHER], 0.0, is_synced=True)
    served = replica("served", revision=SERVED, address="127.0.0.1:1")
    canary = replica("canary", model=OTHER.name, revision=CANARY, address="127.0.0.1:2")
    subject.worker_hello(hello(replicas=(served, canary)), 0.0)
    subject.endpoints_acknowledged(subject.fleet.endpoints(), 0.0)
    subject.load_report([LoadDelta("canary", BUSY)], 0.5)
    return subject


def hold(subject: Core, request_id: str, name: str, caller: Caller = ANYBODY) -> list[actions.Action]:
    found = subject.resolve(name)
    assert found is not None
    assert subject.pick(found, request_id, 1.0) is None
    return subject.hold(found, request_id, size_bytes=0, deadline=60.0, now=1.0, name=name, caller=caller)[1]


def promote(subject: Core) -> list[actions.Action]:
    todo = subject.model_upserted(replace(OWN, revision=CANARY, canary="", canary_percent=0, aliases=("m@next",)), 2.0)
    return [*todo, *subject.model_deleted(OTHER.name, 2.0)]


def abort(subject: Core) -> list[actions.Action]:
    todo = subject.model_upserted(replace(OWN, canary="", canary_percent=0), 2.0)
    return [*todo, *subject.model_deleted(OTHER.name, 2.0)]


def failures(todo: Iterable[actions.Action]) -> dict[str, HeliosError]:
    return {action.hold.request_id: action.error for action in todo if isinstance(action, actions.Fail)}


def released(todo: Iterable[actions.Action]) -> dict[str, str]:
    return {action.hold.request_id: action.pick.endpoints for action in todo if isinstance(action, actions.Release)}


def test_a_busy_canary_makes_nobody_wait() -> None:
    subject = running()
    assigned = subject.rollouts.assign(OWN, "m", "", 1.0)
    assert (assigned.entry, assigned.outcome) == (OWN, "fallback")
    assert subject.pick(assigned.entry, "q", 1.0) is not None
    subject.load_report([LoadDelta("canary", FREE)], 1.5)
    assigned = subject.rollouts.assign(OWN, "m", "", 2.0)
    assert (assigned.entry, assigned.outcome) == (OTHER, "canary")
    # It fills up while Envoy sends the body.
    subject.load_report([LoadDelta("canary", BUSY)], 2.5)
    again = subject.rollouts.still(assigned, OWN)
    assert (again.entry, again.outcome) == (OWN, "fallback")


def test_what_waits_for_a_canary_by_its_tag_or_digest_goes_on_when_it_is_promoted() -> None:
    subject = running()
    hold(subject, "by tag", "m@next")
    hold(subject, "by digest", OTHER.name)
    todo = promote(subject)
    assert (failures(todo), released(todo)) == ({}, {})
    assert subject.holds.count("m") == 2
    todo = subject.load_report([LoadDelta("canary", FREE)], 3.0)
    assert released(todo) == {"by tag": "127.0.0.1:2", "by digest": "127.0.0.1:2"}


def test_what_waits_for_a_canary_that_is_aborted_is_asked_to_come_again() -> None:
    subject = running()
    hold(subject, "by digest", OTHER.name)
    hold(subject, "by tag", "m@next")
    told = failures(abort(subject))
    # The registry still knows the revision; the tag is gone with it.
    assert isinstance(told["by digest"], NoReadyReplica)
    assert told["by digest"].retry_after_seconds
    assert isinstance(told["by tag"], ModelNotFound)


def test_a_tag_that_moves_takes_along_what_waits_and_starts_it_there() -> None:
    subject = core()
    served, old = entry(revision=SERVED), entry(OTHER.name, revision=CANARY, aliases=("m@prod",))
    subject.models_replaced([served, old], 0.0, is_synced=True)
    subject.worker_hello(hello(), 0.0)
    hold(subject, "q", "m@prod")
    todo = subject.model_upserted(replace(served, aliases=("m@prod",)), 2.0)
    todo += subject.model_deleted(old.name, 2.0)
    assert failures(todo) == {}
    orders = [action.command.order for action in todo if isinstance(action, actions.Send)]
    assert [order.revision for order in orders if isinstance(order, StartReplica)] == [SERVED]


def test_what_finds_a_replica_at_its_new_home_goes_there_at_once() -> None:
    subject = running()
    hold(subject, "q", "m@next")
    subject.model_upserted(replace(OWN, aliases=("m@next",)), 2.0)
    assert released(subject.model_deleted(OTHER.name, 2.0)) == {"q": "127.0.0.1:1"}


def test_a_model_that_is_gone_is_not_found() -> None:
    subject = running()
    subject.load_report([LoadDelta("served", BUSY)], 0.5)
    hold(subject, "own", "m")
    hold(subject, "tag", "m@next")
    told = failures([*subject.model_deleted(OTHER.name, 2.0), *subject.model_deleted("m", 2.0)])
    assert {name: type(error) for name, error in told.items()} == {"own": ModelNotFound, "tag": ModelNotFound}


def test_bounds_hold_at_the_new_home() -> None:
    subject = running(HoldLimits(model_count=1))
    subject.load_report([LoadDelta("served", BUSY)], 0.5)
    hold(subject, "first", "m")
    hold(subject, "second", "m@next")
    told = failures(promote(subject))
    assert isinstance(told["second"], Overloaded)
    assert told["second"].retry_after_seconds is not None


def test_a_key_gets_no_model_by_an_alias_that_moves_to_it() -> None:
    subject = core()
    subject.models_replaced([entry("a", aliases=("x",))], 0.0, is_synced=True)
    subject.worker_hello(hello(), 0.0)
    hold(subject, "kept out", "x", Caller("key-1", models=("a",)))
    hold(subject, "let in", "x", Caller("key-2", models=("a", "x")))
    subject.model_upserted(entry("b", revision="sha256:2", aliases=("x",)), 2.0)
    told = failures(subject.model_deleted("a", 2.0))
    assert {name: type(error) for name, error in told.items()} == {"kept out": ModelNotFound}
    assert subject.holds.count("b") == 1


def test_the_journal_follows_a_request_that_moves() -> None:
    journal = Journal(JournalLimits())
    for request_id in ("served", "left"):
        journal.held(
            request_id, name="m@next", began="", model=OTHER.name, revision=CANARY, why="", arrived_at=1.0, now=1.0
        )
        journal.moved(request_id, OTHER.name, "m", SERVED)
    assert [record.model for record in journal.recent(names=frozenset({"m"}))] == ["m", "m"]
    journal.left(OTHER.name, "left", 2.0)
    subject = running()
    picked = subject.pick(OWN, "served", 1.0)
    assert picked is not None
    journal.released("served", picked, (), 2.0)
    assert not journal.recent(state=RequestState.HELD)
