"""How soon a model is ready from each rung of the ladder, how right that was, and that it is known after a restart."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.mesh.transfer.progress import TransferProgress
from helios.proxy import actions
from helios.proxy.activation.rungs import RungEstimates, StartRung, Took
from helios.proxy.catalogue import Catalogue, ModelEntry
from helios.proxy.core import Core
from helios.proxy.fleet.state import Replica, ReplicaState, Staged, StagedState
from helios.proxy.store import Store, load_starts
from tests.proxy.support import GIB, core, entry, hello, ready, replica

S = ReplicaState
WEIGHTS = 10_000_000_000
MODEL = replace(entry(), weights_bytes=WEIGHTS)


def estimates() -> RungEstimates:
    return RungEstimates(base_seconds=5.0, bytes_per_second=1e9)


def took(seconds: float, moved: float) -> Took:
    return Took(seconds, moved, "sha256:1", WEIGHTS)


def test_what_a_start_does_beside_moving_weights_is_the_same_from_every_rung() -> None:
    known = estimates()
    assert known.expected_seconds("m", StartRung.CLOUD, WEIGHTS) == 15.0
    # 3 s of processes and engine, and 100 s for the weights from afar.
    known.record("m", StartRung.CLOUD, took(103.0, 100.0))
    assert known.expected_seconds("m", StartRung.CLOUD, WEIGHTS) == 103.0
    assert known.expected_seconds("m", StartRung.DISK, WEIGHTS) == pytest.approx(3.0 + 10.0)
    known.record("other", StartRung.MEMORY, took(5.0, 2.0))
    # Memory brings 5 GB a second, and the fleet's starts took 3 s beside.
    assert known.expected_seconds("m", StartRung.MEMORY, WEIGHTS) == pytest.approx(5.0)
    assert known.expected_seconds("new", StartRung.MEMORY, WEIGHTS) == pytest.approx(5.0)
    assert known.expected_seconds("new", StartRung.CLOUD, WEIGHTS) == pytest.approx(103.0)
    # What is told of it by others counts where it was never started here.
    assert known.expected_seconds("new", StartRung.CLOUD, WEIGHTS, 40.0) == 40.0


Starts = list[tuple[str, StartRung, float, float]]
starts: st.SearchStrategy[Starts] = st.lists(
    st.tuples(st.sampled_from("ab"), st.sampled_from(StartRung), st.floats(0.01, 500), st.floats(0, 1)), max_size=20
)


@given(st.dictionaries(st.sampled_from(StartRung), st.floats(0.2, 500)))
def test_a_model_that_was_never_started_is_not_promised_later_from_a_higher_rung(moved: dict[StartRung, float]) -> None:
    known = estimates()
    # As it should be: the higher, the faster.
    for rung, seconds in zip(sorted(moved), sorted(moved.values(), reverse=True), strict=True):
        known.record("m", rung, took(seconds + 1.0, seconds))
    promised = [known.expected_seconds("new", rung, WEIGHTS) for rung in sorted(StartRung)]
    assert all(later >= sooner * 0.999 for later, sooner in pairwise(promised)), promised


@given(starts)
def test_what_was_measured_is_read_back_and_promises_the_same(history: Starts) -> None:
    known, again = estimates(), estimates()
    for model, rung, seconds, share in history:
        known.record(model, rung, took(seconds, seconds * share))
        known.score(rung, 1.0, seconds)
    again.restore(json.loads(json.dumps(known.document())))
    assert again.document() == known.document()
    for rung in StartRung:
        assert again.score_of(rung) == known.score_of(rung)
        for model in "abc":
            assert again.expected_seconds(model, rung, WEIGHTS) == known.expected_seconds(model, rung, WEIGHTS)


@given(st.lists(st.tuples(st.floats(0.1, 1000), st.floats(0.1, 1000)), min_size=1, max_size=20))
def test_a_score_lies_between_the_best_and_the_worst_promise(pairs: list[tuple[float, float]]) -> None:
    known = estimates()
    for promised, seconds in pairs:
        known.score(StartRung.DISK, promised, seconds)
    score = known.score_of(StartRung.DISK)
    factors = [math.exp(abs(math.log(promised / seconds))) for promised, seconds in pairs]
    assert score.count == len(pairs)
    assert min(factors) * 0.999 <= score.error_factor <= max(factors) * 1.001
    assert known.score_of(StartRung.CLOUD).count == 0


def world(*replicas: Replica, staged: tuple[Staged, ...] = (), model: ModelEntry = MODEL) -> Core:
    subject = core()
    subject.models_replaced([model], 0.0, is_synced=True)
    told = replace(hello(replicas=replicas, memory_bytes=64 * GIB), host_memory_bytes=64 * GIB, staged=staged)
    subject.worker_hello(told, 0.0)
    subject.endpoints_acknowledged(subject.fleet.endpoints(), 0.0)
    return subject


def start(subject: Core, now: float, *, fetch_seconds: float = 0.0, load_seconds: float = 1.0) -> actions.StartScored:
    """A request starts the model, which takes as long as its parts and 2 s."""
    subject.hold(MODEL, f"q{now}", size_bytes=0, deadline=now + 900, now=now)
    (asked,) = (one for one in subject.fleet.replicas_of("m") if one.state.is_starting)
    end = now + fetch_seconds + load_seconds + 2.0
    events = int(now * 10)
    if fetch_seconds:
        fetching = replace(asked, state=S.FETCHING, fetch=TransferProgress(1, WEIGHTS, 1e8, None))
        subject.replica_event("w", events + 1, fetching, now + 0.1)
    subject.replica_event("w", events + 2, replace(asked, state=S.LOADING), now + fetch_seconds)
    phases = (("fetch", fetch_seconds), ("engine", 2.0), ("load", load_seconds))
    todo = subject.replica_event("w", events + 3, replace(ready(asked), phases=phases), end)
    subject.endpoints_acknowledged(subject.fleet.endpoints(), end)
    return next(action for action in todo if isinstance(action, actions.StartScored))


def stop(subject: Core, now: float) -> None:
    subject.drain_model(MODEL, now)
    for one in list(subject.fleet.replicas_of("m")):
        subject.replica_event("w", int(now * 10), replace(one, state=S.STOPPED), now)


def test_each_rung_has_its_own_promise_and_is_scored_by_what_came_of_it() -> None:
    subject = world()
    promises = subject.lifecycle.promises
    assert promises.promise(MODEL).rung is StartRung.CLOUD
    first = start(subject, 1.0, fetch_seconds=100.0)
    assert (first.rung, first.promised_seconds, first.seconds) == ("CLOUD", 15.0, pytest.approx(103.0))
    assert first.score.error_factor == pytest.approx(103 / 15)
    stop(subject, 200.0)
    # Its weights are on the disk now: nobody is promised the hundred seconds again.
    promise = promises.promise(MODEL)
    assert promise.rung is StartRung.DISK
    assert promise.seconds == pytest.approx(2.0 + 10.0)
    second = start(subject, 300.0, load_seconds=4.0)
    assert (second.rung, second.seconds) == ("DISK", pytest.approx(6.0))
    stop(subject, 400.0)
    assert subject.lifecycle.remaining_seconds(MODEL, 400.0) == pytest.approx(6.0)
    subject.evict(MODEL, 401.0)
    assert promises.promise(MODEL).rung is StartRung.CLOUD
    assert subject.lifecycle.remaining_seconds(MODEL, 401.0) == pytest.approx(103.0)


def test_a_staged_model_and_one_that_sleeps_are_promised_sooner() -> None:
    staged = Staged(MODEL.revision, "m", StagedState.STAGED, "w", WEIGHTS)
    subject = world(staged=(staged,))
    estimates = subject.lifecycle.promises.estimates
    estimates.record("m", StartRung.DISK, took(12.0, 10.0))
    estimates.record("m", StartRung.MEMORY, took(4.0, 2.0))
    estimates.record("m", StartRung.ASLEEP, took(1.5, 1.5))
    assert subject.lifecycle.promises.promise(MODEL).rung is StartRung.MEMORY
    assert subject.lifecycle.remaining_seconds(MODEL, 1.0) == 4.0
    sleeping = world(replace(replica(state=S.ASLEEP), can_sleep=True))
    restored = sleeping.lifecycle.promises.estimates
    restored.restore(estimates.document())
    from_afar = restored.expected_seconds("m", StartRung.CLOUD, WEIGHTS)
    assert sleeping.lifecycle.remaining_seconds(MODEL, 1.0) == 1.5
    sleeping.hold(MODEL, "q", size_bytes=0, deadline=99.0, now=1.0)
    todo = sleeping.replica_event("w", 1, replace(replica(), can_sleep=True, wake_count=1), 3.0)
    scored = next(action for action in todo if isinstance(action, actions.StartScored))
    assert (scored.rung, scored.promised_seconds, scored.seconds) == ("ASLEEP", 1.5, 2.0)
    # A wake says nothing of how long a start takes.
    assert restored.expected_seconds("m", StartRung.DISK, WEIGHTS) == 12.0
    assert restored.expected_seconds("m", StartRung.CLOUD, WEIGHTS) == from_afar


def test_a_start_that_turns_out_to_be_fetched_is_promised_as_one() -> None:
    subject = world()
    subject.lifecycle.promises.estimates.record("m", StartRung.DISK, took(4.0, 2.0))
    subject.lifecycle.promises.estimates.record("m", StartRung.CLOUD, took(60.0, 58.0))
    subject.hold(MODEL, "q", size_bytes=0, deadline=900, now=1.0)
    assert subject.lifecycle.remaining_seconds(MODEL, 2.0) == pytest.approx(3.0)
    (asked,) = subject.fleet.replicas_of("m")
    # The node's disk had dropped it, which no proxy is told.
    fetching = replace(asked, state=S.FETCHING, fetch=TransferProgress(1, WEIGHTS, 0, None))
    subject.replica_event("w", 1, fetching, 2.5)
    assert subject.lifecycle.remaining_seconds(MODEL, 3.0) == pytest.approx(58.0)


def test_a_start_that_is_overdue_is_promised_a_tenth_of_its_time_more() -> None:
    subject = world()
    subject.hold(MODEL, "q", size_bytes=0, deadline=900, now=0.0)
    told = [subject.lifecycle.remaining_seconds(MODEL, now) for now in (5.0, 14.5, 15.0, 200.0)]
    assert told == pytest.approx([10.0, 1.45, 1.5, 20.0])


def test_starts_that_fail_are_not_measured_and_leave_nothing() -> None:
    subject = world()
    subject.hold(MODEL, "q", size_bytes=0, deadline=900, now=1.0)
    (asked,) = subject.fleet.replicas_of("m")
    failed = replace(asked, state=S.FAILED, failure_reason="ENGINE_DIED", failure_message="x")
    todo = subject.replica_event("w", 1, failed, 2.0)
    # Whatever is said of it still: nothing is known of when it began.
    todo += subject.replica_event("w", 2, ready(asked), 60.0)
    assert not any(isinstance(action, actions.StartScored) for action in todo)
    assert subject.lifecycle.promises.estimates.score_of(StartRung.CLOUD).count == 0


@pytest.mark.parametrize("phase_seconds", [-1e15, 1e15])
def test_a_phase_that_can_not_have_been_spoils_no_promise(phase_seconds: float) -> None:
    subject = world()
    start(subject, 10.0, load_seconds=3.0)
    # Of other models: one on no disk, and one whose weights are where these are.
    others = (replace(MODEL, name="other", revision="sha256:other"), replace(MODEL, name="other"))
    before = [subject.lifecycle.promises.promise(other).seconds for other in others]
    stop(subject, 30.0)
    subject.hold(MODEL, "q", size_bytes=0, deadline=900.0, now=40.0)
    (asked,) = (one for one in subject.fleet.replicas_of("m") if one.state.is_starting)
    subject.replica_event("w", 401, replace(ready(asked), phases=(("load", phase_seconds),)), 42.0)
    after = [subject.lifecycle.promises.promise(other).seconds for other in others]
    assert all(later <= sooner * 1.001 for later, sooner in zip(after, before, strict=True))


async def test_a_proxy_that_restarts_promises_what_it_knew(tmp_path: Path) -> None:
    subject = world()
    start(subject, 1.0, fetch_seconds=50.0)
    stop(subject, 100.0)
    told = subject.lifecycle.remaining_seconds(MODEL, 101.0)
    store = Store(tmp_path / "state", Catalogue())
    await store.save_starts(subject.lifecycle.promises.estimates.document())
    again = world()
    assert again.lifecycle.remaining_seconds(MODEL, 1.0) != pytest.approx(told)
    load_starts(tmp_path / "state", again.lifecycle.promises.estimates)
    assert again.lifecycle.remaining_seconds(MODEL, 1.0) == pytest.approx(told)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"[1]", b'[{"means": 1}]', b'[{"means": [["m", "SKY", 1]]}]', b'[{"means": [["m", "DISK"]]}]'],
)
def test_a_damaged_file_of_starts_counts_as_absent(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "starts.json").write_bytes(content)
    known = estimates()
    load_starts(tmp_path, known)
    assert known.document() == estimates().document()


NO_PARTS: list[object] = [None, 1, [1], [[]]]
NO_NUMBERS: list[object] = [10**400, "soon", []]
NO_SECONDS: list[object] = [-1.0, float("inf"), float("nan"), *NO_NUMBERS]
NO_SCORES: list[object] = [[1, 0.5], [1, float("nan")], [float("inf"), 2.0], [-1, 2.0], [1], None]
DAMAGES: list[Mapping[str, object]] = [
    *({part: value} for part in ("means", "fixed", "fetched", "rates", "scores") for value in NO_PARTS),
    *({"rates": {"DISK": value}} for value in (*NO_SECONDS, 0.0, None)),
    *({"fixed": {"m": value}} for value in (*NO_SECONDS, None)),
    *({"means": [["m", "DISK", value]]} for value in (*NO_SECONDS, None)),
    *({"fleet_fixed": value} for value in NO_SECONDS),
    *({"scores": {"DISK": value}} for value in NO_SCORES),
    {"rates": {"SKY": 1.0}},
    {"fetched": ["sha256:1", None]},
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: repr(damage)[:40])
def test_a_damaged_document_is_refused_and_nothing_of_it_taken_in(damage: Mapping[str, object]) -> None:
    known, other = estimates(), estimates()
    known.record("m", StartRung.DISK, took(2.0, 1.0))
    other.record("n", StartRung.CLOUD, replace(took(9.0, 1.0), revision="sha256:n"))
    before = known.document()
    with pytest.raises(ValueError, match=r"."):
        known.restore({**other.document(), **damage})
    assert known.document() == before


@pytest.mark.parametrize("part", sorted(estimates().document()))
def test_a_document_without_one_of_its_parts_is_refused(part: str) -> None:
    document = estimates().document()
    del document[part]
    with pytest.raises(ValueError, match=part):
        estimates().restore(document)


@pytest.mark.parametrize("document", [None, 1, [], "means"])
def test_another_document_is_refused(document: Any) -> None:
    with pytest.raises(ValueError, match="another thing"):
        estimates().restore(document)


def test_a_revision_that_is_started_again_stays_known_as_fetched() -> None:
    known = estimates()
    for revision in ("again", *map(str, range(19_999)), "again", "last"):
        known.record("m", StartRung.DISK, replace(took(2.0, 1.0), revision=revision))
    assert not known.was_fetched("0"), "of so many, the one whose last start is the longest ago is not known any more"
    assert all(map(known.was_fetched, ("again", "1", "last")))


@pytest.mark.parametrize("rate", [0.0, -1.0, float("inf"), float("nan")])
def test_a_rate_that_can_not_be_is_not_read_back(rate: float) -> None:
    known = estimates()
    known.record("m", StartRung.DISK, took(2.0, 1.0))
    document = known.document() | {"rates": {"DISK": rate}}
    with pytest.raises(ValueError, match="no number"):
        estimates().restore(document)
