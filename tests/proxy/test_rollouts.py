"""Rollouts: shares that are exact, keys that stay, canaries that hurt nobody, replicas that go on after a promotion."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from helios.proxy import actions
from helios.proxy.catalogue import ModelEntry
from helios.proxy.core import Core
from helios.proxy.explain.journal import Journal, JournalLimits
from helios.proxy.explain.record import Finished
from helios.proxy.fleet.commands import DrainReplica, StartReplica, StopReplica
from helios.proxy.fleet.state import Replica, ReplicaState
from helios.proxy.rollouts import Assignment
from helios.proxy.routing.pick import Pick
from helios.proxy.routing.split import Splitter
from tests.proxy.support import core, entry, hello, ready, replica

SERVED, CANARY = "sha256:" + "a" * 64, "sha256:" + "b" * 64
NAME = "m@" + "b" * 12
ADAPTED = '{"lora": {"adapters": [{"name": "adapter", "model": "adapter"}]}}'


def own(percent: int = 10, *, revision: str = SERVED) -> ModelEntry:
    return replace(entry(revision=revision), canary=NAME if percent >= 0 else "", canary_percent=max(0, percent))


def canary(aliases: tuple[str, ...] = ()) -> ModelEntry:
    return entry(NAME, revision=CANARY, aliases=aliases)


def starts(todo: list[actions.Action]) -> list[StartReplica]:
    return [a.command.order for a in todo if isinstance(a, actions.Send) and isinstance(a.command.order, StartReplica)]


def stopped(todo: list[actions.Action]) -> set[str]:
    orders = [action.command.order for action in todo if isinstance(action, actions.Send)]
    return {order.replica_id for order in orders if isinstance(order, DrainReplica | StopReplica)}


def running(percent: int = 10, *, has_canary: bool = True) -> Core:
    """A model with a replica of what it serves, and one of its canary."""
    subject = core()
    subject.models_replaced([own(percent), canary()], 0.0, is_synced=True)
    replicas = [replica("served", revision=SERVED, address="127.0.0.1:1")]
    if has_canary:
        replicas.append(replica("canary", model=NAME, revision=CANARY, address="127.0.0.1:2"))
    subject.worker_hello(hello(replicas=tuple(replicas)), 0.0)
    subject.endpoints_acknowledged(subject.fleet.endpoints(), 0.0)
    return subject


def outcomes(subject: Core, count: int, key: str = "", name: str = "m") -> list[str]:
    found = [subject.rollouts.assign(subject.catalogue.find(name) or entry(), name, key, 1.0) for _ in range(count)]
    return [one.outcome for one in found]


@given(st.integers(0, 100), st.lists(st.integers(1, 250), min_size=1, max_size=5))
def test_requests_without_a_key_are_split_exactly(percent: int, lengths: list[int]) -> None:
    splitter = Splitter()
    for length in lengths:
        given_count = sum(splitter.takes_canary(own(percent), "") for _ in range(length))
        assert abs(given_count - length * percent / 100) < 1
    splitter.forget("m")
    assert sum(splitter.takes_canary(own(percent), "") for _ in range(100)) == percent


@given(st.text(min_size=1, max_size=40), st.integers(0, 99))
def test_a_key_stays_at_its_revision_and_only_moves_on(key: str, percent: int) -> None:
    first, second = Splitter(), Splitter()
    takes = first.takes_canary(own(percent), key)
    assert [second.takes_canary(own(percent), key) for _ in range(3)] == [takes] * 3
    assert not takes or first.takes_canary(own(percent + 1), key)
    assert not first.takes_canary(own(0), key)
    assert first.takes_canary(own(100), key)


def test_keys_are_split_by_the_weight() -> None:
    splitter = Splitter()
    given_count = sum(splitter.takes_canary(own(20), f"user-{number}") for number in range(5000))
    # Five standard deviations.
    assert abs(given_count - 1000) < 5 * (5000 * 0.2 * 0.8) ** 0.5


def test_a_tenth_of_the_requests_is_the_canarys() -> None:
    found = outcomes(running(), 100)
    assert (found.count("canary"), found.count("served")) == (10, 90)
    assert set(outcomes(running(0), 20)) == {""}


def test_requests_that_name_a_revision_or_an_adapter_are_not_split() -> None:
    subject = running(100)
    assert outcomes(subject, 3) == ["canary"] * 3
    adapted = replace(own(100), engine_settings=ADAPTED)
    assert adapted.adapters == ("adapter",)
    for name in ("m@prod", NAME, "adapter"):
        assert subject.rollouts.assign(adapted, name, "", 1.0) == Assignment(adapted)


def test_a_canary_without_a_replica_is_started_and_its_share_answered_by_the_served_revision() -> None:
    subject = running(50, has_canary=False)
    assert set(outcomes(subject, 10)) == {"served", "fallback"}
    ordered = starts(subject.tick(1.1))
    assert [(order.model, order.revision) for order in ordered] == [(NAME, CANARY)]
    asked = subject.fleet.replica(ordered[0].replica_id)
    assert asked is not None
    subject.replica_event("w", 1, ready(asked, "127.0.0.1:2"), 2.0)
    subject.endpoints_acknowledged(subject.fleet.endpoints(), 2.0)
    assert outcomes(subject, 10).count("canary") == 5


def test_a_canary_that_can_not_start_is_tried_again_by_requests_and_never_waited_for() -> None:
    subject = running(100, has_canary=False)
    seen = 0
    for second in range(2, 40):
        subject.worker_seen("w", float(second))
        assert subject.rollouts.assign(own(100), "m", "", float(second)).outcome == "fallback"
        for order in starts(subject.tick(float(second))):
            seen += 1
            asked = subject.fleet.replica(order.replica_id)
            assert asked is not None
            failed = replace(asked, state=ReplicaState.FAILED, failure_reason="OUT_OF_MEMORY")
            subject.replica_event("w", seen, failed, float(second))
    # Pauses of 1, 2, 4, 8 and 16 seconds lie between.
    assert 4 <= seen <= 7
    assert not subject.holds.statistics().count
    assert subject.traffic.is_candidate("served")


def test_a_canary_takes_no_room_from_others() -> None:
    subject = core()
    other = entry("other", revision="sha256:o")
    subject.models_replaced([own(100), canary(), other], 0.0, is_synced=True)
    replicas = (replica("served", revision=SERVED), replica("o", model="other", revision="sha256:o", address="x:1"))
    subject.worker_hello(hello(replicas=replicas, memory_bytes=5 << 29), 0.0)
    subject.endpoints_acknowledged(subject.fleet.endpoints(), 0.0)
    assert outcomes(subject, 1) == ["fallback"]
    todo = subject.tick(700.0)
    assert (starts(todo), stopped(todo)) == ([], set())


def promoted(subject: Core, now: float) -> list[actions.Action]:
    todo = subject.model_upserted(replace(own(-1), revision=CANARY), now)
    return [*todo, *subject.model_deleted(NAME, now)]


def test_a_promoted_canary_goes_on_with_its_replicas_and_takes_all_requests_at_once() -> None:
    subject = running()
    before = subject.fleet.endpoints()
    todo = promoted(subject, 1.0)
    assert (stopped(todo), starts(todo)) == ({"served"}, [])
    assert subject.fleet.endpoints() == before
    assert list(subject.fleet.check()) == []
    found = subject.catalogue.find("m")
    assert found is not None
    picked = subject.pick(found, "q", 1.0)
    assert picked is not None
    assert (picked.model, picked.revision, picked.endpoints) == ("m", CANARY, "127.0.0.1:2")
    # Its worker goes on to speak of it as what it was started for; so it does to the next proxy.
    told = replica("canary", model=NAME, revision=CANARY, address="127.0.0.1:2")
    subject.replica_event("w", 1, told, 2.0)
    subject.worker_hello(hello(replicas=(told,)), 3.0)
    assert [one.replica_id for one in subject.fleet.replicas_of("m")] == ["canary"]
    assert stopped(subject.tick(4.0)) == set()
    assert subject.traffic.is_candidate("canary")


def test_a_canary_that_is_promoted_while_it_starts_is_adopted() -> None:
    subject = running(100, has_canary=False)
    outcomes(subject, 1)
    ordered = starts(subject.tick(1.0))
    todo = promoted(subject, 2.0)
    assert (starts(todo), stopped(todo)) == ([], {"served"})
    found = subject.catalogue.find("m")
    assert found is not None
    _, more = subject.hold(found, "q", size_bytes=0, deadline=99.0, now=2.0)
    assert starts(more) == []
    asked = subject.fleet.replica(ordered[0].replica_id)
    assert asked is not None
    assert asked.model == "m"
    # The worker still calls it by the name that it was started for.
    subject.replica_event("w", 1, ready(replace(asked, model=NAME), "127.0.0.1:2"), 3.0)
    todo = subject.endpoints_acknowledged(subject.fleet.endpoints(), 3.0)
    assert [action.hold.request_id for action in todo if isinstance(action, actions.Release)] == ["q"]


def test_an_aborted_canary_drains_and_gets_nothing_more() -> None:
    subject = running(100)
    assert outcomes(subject, 1) == ["canary"]
    todo = [*subject.model_upserted(own(-1), 1.0), *subject.model_deleted(NAME, 1.0)]
    assert stopped(todo) == {"canary"}
    assert outcomes(subject, 5) == [""] * 5
    assert subject.traffic.is_candidate("served")


def test_what_is_not_served_any_more_goes_on_where_a_tag_still_names_it() -> None:
    subject = running()
    before = entry("m@" + "a" * 12, revision=SERVED, aliases=("m@stable",))
    # As the session tells them: the model itself comes last.
    todo = subject.model_upserted(before, 1.0)
    todo += subject.model_upserted(replace(own(-1), revision=CANARY), 1.0)
    todo += subject.model_deleted(NAME, 1.0)
    assert stopped(todo) == set()
    homes = {one.replica_id: one.model for one in subject.fleet.replicas()}
    assert homes == {"served": before.name, "canary": "m"}


def test_a_replica_that_drains_stays_where_it_is() -> None:
    subject = running()
    drained = subject.fleet.replica("canary")
    assert drained is not None
    subject.lifecycle.drain(drained, 0.5)
    promoted(subject, 1.0)
    told: Replica = replace(drained, state=ReplicaState.DRAINING)
    subject.replica_event("w", 1, told, 2.0)
    found = subject.fleet.replica("canary")
    assert found is not None
    assert found.model == NAME


def test_why_says_which_revision_and_by_what() -> None:
    subject = running(100)
    assigned = subject.rollouts.assign(own(100), "m", "user-1", 1.0)
    assert assigned.entry.name == NAME
    picked = subject.pick(assigned.entry, "q", 1.0)
    assert picked is not None
    journal = Journal(JournalLimits())
    told: list[tuple[Pick, int]] = []
    journal.on_split = lambda pick, finished: told.append((pick, finished.status_code))
    journal.picked("q", ("m", picked._replace(split=assigned.why), (), "", 1.0, 1.1))
    journal.finished("q", Finished("canary", 0, 1, 2, 0.1, 0.2, 2.0))
    record = journal.find("q")
    assert record is not None
    reason = next(phase.reason for phase in record.phases(3.0) if phase.phase == "resolve")
    assert reason == f"m is rolled out: 100 % go to {NAME}, this one by its key; {NAME}, revision {CANARY[:19]}"
    assert [(pick.revision, code) for pick, code in told] == [(CANARY, 0)]
