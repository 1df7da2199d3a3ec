"""What an operator is told of an order beforehand is what it does then, and asking changes nothing."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.mesh.errors import HeliosError
from helios.proxy.actions import Send
from helios.proxy.admin.plans import plan_evict, plan_preload, plan_stage, plan_unstage
from helios.proxy.catalogue import ModelEntry
from helios.proxy.core import Core
from helios.proxy.fleet.commands import StageRevision, StartReplica
from helios.proxy.fleet.state import Replica, ReplicaState
from tests.proxy.support import GIB, core, entry, hello, ready

T = TypeVar("T")


def outcome(call: Callable[[], T]) -> T | str:
    """What a call returns, or the reason of its error."""
    try:
        return call()
    except HeliosError as error:
        return error.reason


def believed(subject: Core) -> object:
    """What an order would change."""
    return (
        sorted(map(repr, subject.fleet.replicas())),
        sorted((worker.hello.worker_id, repr(worker.staged)) for worker in subject.fleet.workers()),
        sorted(subject.fleet.cordoned),
        subject.traffic.last_used_at("m"),
        subject.lifecycle.activation("m").state,
    )


@given(
    memories=st.lists(st.sampled_from([GIB // 2, GIB, 2 * GIB, 8 * GIB]), max_size=4),
    cordoned=st.sets(st.integers(0, 3)),
    has_other=st.booleans(),
    min_replicas=st.integers(0, 1),
)
def test_a_preload_goes_where_it_was_said_to_go(
    memories: list[int], cordoned: set[int], has_other: bool, min_replicas: int
) -> None:
    subject = core()
    models = [entry(), *([entry("n", min_replicas=min_replicas)] if has_other else [])]
    subject.models_replaced(models, 0.0, is_synced=True)
    for number, memory in enumerate(memories):
        subject.worker_hello(hello(f"w{number}", memory_bytes=memory), 0.0)
    for number in sorted(cordoned & set(range(len(memories)))):
        subject.cordon(f"w{number}", 0.0, is_cordoned=True)
    before = believed(subject)
    plan = outcome(lambda: plan_preload(subject, entry(), 1.0))
    assert believed(subject) == before
    sent = outcome(lambda: subject.preload(entry(), 1.0))
    if isinstance(plan, str):
        # A model that waits for a worker is no error of the order itself.
        assert sent == plan or (plan == "NO_WORKER" and not subject.fleet.replicas_of("m"))
        return
    assert not isinstance(sent, str)
    started = [each.command for each in sent if isinstance(each, Send) and isinstance(each.command.order, StartReplica)]
    assert [command.worker_id for command in started] == ([plan.worker_id] if plan.worker_id else [])


def test_a_preload_of_what_is_there_starts_nothing() -> None:
    subject = running()
    assert not plan_preload(subject, entry(), 3.0).worker_id
    assert plan_preload(subject, entry(), 3.0).placement == "there is one"


def running(*, min_replicas: int = 0) -> Core:
    """`m` with a replica on a worker whose host memory holds its weights."""
    subject = core()
    subject.models_replaced([weighty(min_replicas)], 0.0, is_synced=True)
    subject.worker_hello(replace(hello(), host_memory_bytes=2 * GIB), 0.0)
    if not min_replicas:
        subject.preload(weighty(), 0.0)
    (asked,) = subject.fleet.replicas()
    subject.replica_event("w", 1, ready(asked), 1.0)
    subject.endpoints_acknowledged(frozenset({"127.0.0.1:1000"}), 1.0)
    return subject


def weighty(min_replicas: int = 0) -> ModelEntry:
    return replace(entry(min_replicas=min_replicas), weights_bytes=GIB)


@pytest.mark.parametrize("min_replicas", [0, 1])
def test_evicting_and_staging_are_said_as_they_are_done(min_replicas: int) -> None:
    subject, model = running(min_replicas=min_replicas), weighty(min_replicas)
    before = believed(subject)
    evicting = outcome(lambda: plan_evict(subject, model))
    staging = outcome(lambda: plan_stage(subject, model))
    assert plan_unstage(subject, model) == 0
    assert believed(subject) == before
    if min_replicas:
        assert (evicting, staging) == ("MODEL_PINNED", "MODEL_PINNED")
        assert outcome(lambda: subject.evict(model, 2.0)) == "MODEL_PINNED"
        return
    assert not isinstance(staging, str)
    staged, count, todo = subject.stage(model, 2.0)
    assert (staged, count) == staging
    assert next(each.command.order for each in todo if isinstance(each, Send)) == StageRevision("sha256:1", "m", GIB)
    assert plan_unstage(subject, model) == subject.unstage(model, 3.0)[0] == 1
    assert subject.evict(model, 4.0)[0] == evicting == 1


def test_nothing_gives_way_to_what_does_not_fit_even_then() -> None:
    subject = running()
    subject.stage(weighty(), 2.0)
    other = replace(entry("n", revision="sha256:2"), weights_bytes=3 * GIB)
    subject.model_upserted(other, 2.0)
    assert outcome(lambda: plan_stage(subject, other)) == "NO_CAPACITY"
    assert outcome(lambda: subject.stage(other, 3.0)) == "NO_CAPACITY"
    (worker,) = subject.fleet.workers()
    assert list(worker.staged) == ["sha256:1"]


def test_sleep_and_wake_are_refused_beforehand_as_they_are_then() -> None:
    subject = running()
    (replica,) = subject.fleet.replicas()

    def both(check: Callable[[Replica], object], order: Callable[[Replica, float], object]) -> tuple[object, object]:
        return outcome(lambda: check(replica)), outcome(lambda: order(replica, 3.0))

    lifecycle = subject.lifecycle
    assert both(lifecycle.check_sleep, subject.sleep) == ("SLEEP_UNSUPPORTED", "SLEEP_UNSUPPORTED")
    assert lifecycle.check_wake(replica) is False
    able = replace(replica, can_sleep=True)
    subject.replica_event("w", 2, able, 2.0)
    before = believed(subject)
    assert lifecycle.check_sleep(able) is True
    assert believed(subject) == before
    subject.sleep(able, 3.0)
    (asleep,) = subject.fleet.replicas()
    assert asleep.state is ReplicaState.ASLEEP
    assert lifecycle.check_sleep(asleep) is False
    assert lifecycle.check_wake(asleep) is True
    subject.cordon("w", 4.0, is_cordoned=True)
    assert outcome(lambda: lifecycle.check_wake(asleep)) == "WORKER_CORDONED"
    assert outcome(lambda: subject.wake(asleep, 5.0)) == "WORKER_CORDONED"
