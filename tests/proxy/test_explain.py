"""Explanations: phases add up whatever happened, memory is bounded, requests are joined with the right starts."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from helios import worker
from helios.proxy.explain.journal import Journal, JournalLimits
from helios.proxy.explain.record import RECORD_BYTES, Finished, Move, Record, Refusal, RequestState
from helios.proxy.explain.ring import Picked, Ring
from helios.proxy.explain.start import Start
from helios.proxy.explain.timeline import UNEXPLAINED, Phase, Segment, lay_out
from helios.proxy.fleet.state import ReplicaState
from helios.proxy.routing.pick import Pick
from helios.proxy.routing.table import Candidate
from tests.proxy.support import replica

# The wall clock of these tests is the monotonic one plus this.
WALL = 1_000_000.0
PICK = Pick("m", "sha256:1", (Candidate("r", "127.0.0.1:1000", 1.0, 1.0, 1.0, 1.0),), 1)
TIMES = st.floats(-100, 100, allow_nan=False)
PHASES = (("schedule", 9.0), ("fetch", 0.5), ("fork", 0.25), ("load", 1.0), ("report", 0.25))


def picked(arrived_at: float = 0.0, answered_at: float = 0.0) -> Picked:
    return ("m", PICK, (), "", arrived_at, answered_at)


def journal(count: int = 100) -> Journal:
    return Journal(JournalLimits(count, 1 << 20), wall_offset=WALL)


def held(subject: Journal, request_id: str, now: float) -> None:
    subject.held(
        request_id, name="alias", began="", model="m", revision="sha256:1", why="there is none", arrived_at=now, now=now
    )


def finished(*, first: float | None = 0.5, duration: float = 1.0, heard_at: float = 0.0) -> Finished:
    return Finished("r", 0, 5, 7, first, duration, heard_at)


def moved(reached: str, *, at: float, left: str = "r1") -> Move:
    return Move(left, reached, is_drain=False, reason="REPLICA_LOST", token_count=12, waited_seconds=0.5, at=at)


def names(phases: tuple[Phase, ...]) -> list[str]:
    return [phase.phase for phase in phases]


def seconds(phases: tuple[Phase, ...]) -> dict[str, Any]:
    return {phase.phase: pytest.approx(phase.seconds) for phase in phases}


def cold_start(subject: Journal, *, asked_at: float = 0.0) -> None:
    """A start that is ordered half a second after it was asked for, and published four seconds later."""
    subject.start_begun("m", "r", "w", "w fits", asked_at + 0.5)
    # The worker has the order 0.2 s later, is ready after two seconds of its own, and the news takes 0.3 s.
    told = replica("r", state=ReplicaState.LOADING)
    subject.replica_changed(replace(told, phases=PHASES[:2], created_at=WALL + asked_at + 0.7), asked_at + 1.5)
    ready = replace(told, state=ReplicaState.READY, phases=PHASES, created_at=WALL + asked_at + 0.7)
    subject.replica_changed(ready, asked_at + 3.0)
    subject.published(frozenset({ready.address}), asked_at + 4.0)


# Phases.


@given(
    begin=TIMES,
    length=st.floats(0, 100),
    segments=st.lists(st.tuples(st.sampled_from(["a", "b", UNEXPLAINED]), TIMES, TIMES), max_size=12),
)
def test_phases_always_add_up_and_none_is_negative(
    begin: float, length: float, segments: list[tuple[str, float, float]]
) -> None:
    phases = lay_out(begin, begin + length, [Segment(*segment) for segment in segments])
    assert sum(phase.seconds for phase in phases) == pytest.approx(length, abs=2e-6)
    assert all(phase.seconds > 0 for phase in phases)
    assert UNEXPLAINED not in names(phases)[:-1]


def test_what_no_phase_covers_is_one_row_of_its_own() -> None:
    phases = lay_out(0, 10, [Segment("a", 1, 3), Segment("b", 2, 5), Segment(UNEXPLAINED, 5, 6), Segment("c", 8, 20)])
    assert [(phase.phase, phase.seconds) for phase in phases] == [("a", 2), ("b", 2), ("c", 2), (UNEXPLAINED, 4)]


def test_a_cold_request_is_explained_to_the_last_millisecond() -> None:
    subject = journal()
    held(subject, "q", 0.0)
    cold_start(subject)
    subject.released("q", PICK, (), 4.0)
    subject.arrived("q", "r", WALL + 4.1, 4.3)
    subject.finished("q", finished(heard_at=5.3))
    record = subject.find("q")
    assert record is not None
    phases = record.phases(100.0)
    assert seconds(phases) == {
        "schedule": 0.5, "order": 0.2, "fetch": 0.5, "fork": 0.25, "load": 1.0, "report": 0.25,
        "publish": 1.3, "send": 0.1, "first_token": 0.5,
    }  # fmt: skip
    assert names(phases)[0] == "schedule"
    assert record.explained_seconds(100.0) == pytest.approx(4.6)
    start = record.hold.starts[0] if record.hold is not None else None
    assert start is not None
    assert (start.requested_by, start.placement) == ("q", "w fits")
    assert sum(phase.seconds for phase in subject.start_phases(start, 100.0)) == pytest.approx(4.0)


def test_a_request_that_joins_a_start_pays_for_the_rest_of_it() -> None:
    subject = journal()
    held(subject, "first", 0.0)
    subject.start_begun("m", "r", "w", "", 0.5)
    held(subject, "late", 2.0)
    ready = replace(replica("r"), phases=PHASES, created_at=WALL + 0.7)
    subject.replica_changed(ready, 3.0)
    subject.published(frozenset({ready.address}), 4.0)
    for request_id in ("first", "late"):
        subject.released(request_id, PICK, (), 4.0)
        subject.arrived(request_id, "r", WALL + 4.0, 4.0)
        subject.finished(request_id, finished(heard_at=5.0))
    late = subject.find("late")
    assert late is not None
    assert late.hold is not None
    # Of load, half was over when it came.
    assert seconds(late.phases(9.0)) == {"load": 0.45, "report": 0.25, "publish": 1.3, "first_token": 0.5}
    assert "2.0 s" in late.hold.why or "starting for" in late.hold.why
    assert late.hold.starts[0].requested_by == "first"


@pytest.mark.parametrize("skew_seconds", [-3600.0, -0.4, 0.0, 0.4, 3600.0])
def test_clocks_that_differ_move_time_between_the_legs_and_nowhere_else(skew_seconds: float) -> None:
    start = Start("m", 0.0, replica_id="r", worker_id="w", ordered_at=0.5)
    start.follow(replace(replica("r"), phases=PHASES, created_at=WALL + 0.7 + skew_seconds), WALL)
    start.ready_at, start.published_at = 3.0, 4.0
    phases = seconds(lay_out(0.0, 4.0, start.segments(4.0)))
    assert {name: phases[name] for name in ("fetch", "fork", "load", "report")} == {
        "fetch": 0.5, "fork": 0.25, "load": 1.0, "report": 0.25,
    }  # fmt: skip
    assert UNEXPLAINED not in phases
    legs = sum(segment.end - segment.begin for segment in start.segments(4.0) if segment.phase in ("order", "publish"))
    assert legs == pytest.approx(1.5)


def test_room_that_was_made_is_a_phase_with_its_victims() -> None:
    subject = journal()
    held(subject, "q", 0.0)
    for now in (0.25, 0.5):
        subject.start_delayed("m", "draining other (unused for 9 s)", now)
    cold_start(subject, asked_at=1.0)
    subject.released("q", PICK, (), 5.0)
    record = subject.find("q")
    assert record is not None
    found = {phase.phase: phase for phase in record.phases(5.0)}
    assert (found["schedule"].seconds, found["wait_room"].seconds) == (0.25, 1.25)
    assert found["wait_room"].reason == "draining other (unused for 9 s)"


def test_a_start_that_failed_says_why_and_the_next_one_goes_on() -> None:
    subject = journal()
    held(subject, "q", 0.0)
    subject.start_begun("m", "r1", "w", "", 0.0)
    gone = replace(replica("r1", state=ReplicaState.FAILED), failure_reason="BAD_CHECKPOINT", failure_message="torn")
    subject.replica_changed(gone, 1.0)
    subject.start_begun("m", "r", "w", "", 1.0)
    ready = replace(replica("r"), phases=PHASES, created_at=WALL + 1.0)
    subject.replica_changed(ready, 3.0)
    subject.published(frozenset({ready.address}), 3.0)
    subject.released("q", PICK, (), 3.0)
    record = subject.find("q")
    assert record is not None
    assert record.hold is not None
    phases = record.phases(3.0)
    assert (phases[0].phase, phases[0].reason) == ("starting", "came to nothing: BAD_CHECKPOINT: torn")
    assert [start.failure for start in record.hold.starts] == ["BAD_CHECKPOINT: torn", ""]
    assert sum(phase.seconds for phase in phases) == pytest.approx(3.0)
    assert [failed.replica.replica_id for failed in subject.failures] == ["r1"]


def test_requests_that_end_without_a_replica_are_explained_too() -> None:
    subject = journal()
    refusal = Refusal("MODEL_NOT_FOUND", "no such model", 5, None)
    subject.refused("unknown", refusal, name="nope", began="", model="", revision="", arrived_at=0.0, now=0.1)
    held(subject, "expired", 1.0)
    told = Refusal("HOLD_EXPIRED", "still starting; try again in 7 s", 14, 7.0)
    subject.refused("expired", told, name="alias", began="", model="m", revision="", arrived_at=1.0, now=3.0)
    held(subject, "left", 4.0)
    subject.left("m", "left", 5.0)
    states = [(record.request_id, record.state) for record in subject.recent()]
    assert states == [
        ("left", RequestState.LEFT), ("expired", RequestState.REFUSED), ("unknown", RequestState.REFUSED),
    ]  # fmt: skip
    expired = subject.find("expired")
    assert expired is not None
    assert (expired.refusal, expired.explained_seconds(99.0)) == (told, 2.0)
    assert seconds(expired.phases(99.0)) == {"hold": 2.0}
    assert [record.request_id for record in subject.recent(names=frozenset({"nope"}))] == ["unknown"]
    assert [record.request_id for record in subject.recent(state=RequestState.LEFT)] == ["left"]


def test_a_request_that_envoy_sent_to_a_second_replica_is_that_ones() -> None:
    subject = journal()
    subject.picked("q", picked(0.0, 0.0))
    subject.arrived("q", "r1", WALL + 0.5, 0.5)
    subject.finished("q", Finished("r1", 14, 0, 0, None, 0.5, 1.0))
    subject.arrived("q", "r2", WALL + 2.0, 2.0)
    assert [record.state for record in subject.recent()] == [RequestState.RUNNING]
    subject.finished("q", Finished("r2", 0, 5, 7, 0.5, 1.0, 3.0))
    # Reports come again after a reconnect.
    subject.arrived("q", "r1", WALL + 0.5, 9.0)
    subject.arrived("q", "r2", WALL + 2.0, 9.0)
    record = subject.find("q")
    assert record is not None
    assert seconds(record.phases(9.0)) == {"send": 2.0, "first_token": 0.5}
    assert record.finished is not None
    assert record.finished.replica_id == "r2"


def test_a_durable_answer_has_the_first_token_of_its_first_replica() -> None:
    subject = journal()
    subject.picked("q", picked(answered_at=0.5))
    subject.arrived("q", "r1", WALL + 1.0, 1.1)
    assert subject.moved_on("q", moved("r2", at=5.0), 1.25)
    subject.arrived("q", "r2", WALL + 5.0, 5.1)
    # The end of the replica that was left may be told late.
    subject.finished("q", finished(duration=3.0)._replace(replica_id="r1", status_code=14))
    subject.finished("q", finished(first=0.1, duration=2.0)._replace(replica_id="r2"))
    record = subject.find("q")
    assert record is not None
    assert record.finished is not None
    assert (record.finished.replica_id, record.finished.status_code) == ("r2", 0)
    assert (record.first_token_at, record.ended_at) == (1.25, 7.0)
    assert seconds(record.phases(9.0)) == {"resolve": 0.5, "send": 0.5, "first_token": 0.25}
    assert [move.reached for move in record.moves] == ["r2"]


def test_a_durable_answer_that_nobody_went_on_with_is_over() -> None:
    subject = journal()
    subject.picked("q", picked())
    subject.arrived("q", "r1", WALL + 1.0, 1.1)
    subject.moved_on("q", moved("", at=5.0), 1.25)
    record = subject.find("q")
    assert record is not None
    assert (record.state, record.ended_at) == (RequestState.FINISHED, 5.0)
    assert record.finished is not None
    assert (record.finished.status_code, record.finished.completion_tokens) == (14, 12)


def test_of_an_answer_that_moves_on_and_on_the_newest_moves_are_kept() -> None:
    subject = journal()
    subject.picked("q", picked())
    for number in range(20):
        subject.moved_on("q", moved("r2", left=f"l{number}", at=float(number)), None)
    record = subject.find("q")
    assert record is not None
    assert [move.left for move in record.moves] == [f"l{number}" for number in range(4, 20)]
    assert not subject.moved_on("unknown", moved("r2", at=1.0), None)


def test_each_phase_of_a_start_is_measured_once() -> None:
    subject, measured = journal(), list[tuple[str, str, float]]()
    subject.on_phase = lambda model, phase, spent: measured.append((model, phase, spent))
    held(subject, "q", 0.0)
    held(subject, "late", 0.1)
    cold_start(subject)
    for request_id in ("q", "late"):
        subject.released(request_id, PICK, (), 4.0)
        subject.finished(request_id, finished(heard_at=5.0))
    subject.published(frozenset({"127.0.0.1:1000"}), 6.0)
    assert [name for _, name, _ in measured] == [
        "schedule", "order", "fetch", "fork", "load", "report", "publish", "first_token",
    ]  # fmt: skip
    assert sum(spent for _, _, spent in measured) == pytest.approx(4.5)


# Memory.


class RingMachine(RuleBasedStateMachine):
    """Any order of notes, records and growth."""

    def __init__(self) -> None:
        super().__init__()
        self.ring = Ring(5, 8 * RECORD_BYTES)

    @rule(key=st.sampled_from("abcdefgh"))
    def note(self, key: str) -> None:
        self.ring.note(key, picked())
        assert self.ring.get(key) is not None, "the newest is kept"

    @rule(key=st.sampled_from("abcdefgh"))
    def put(self, key: str) -> None:
        self.ring.put(Record(key, "m", "", 0.0, WALL))
        assert self.ring.get(key) is not None, "the newest is kept"

    @rule(key=st.sampled_from("abcdefgh"), more=st.integers(0, 3 * RECORD_BYTES))
    def grow(self, key: str, more: int) -> None:
        record = self.ring.get(key)
        if record is not None:
            self.ring.grow(record, more)

    @invariant()
    def never_holds_more_than_its_bounds(self) -> None:
        assert len(self.ring) <= 5
        assert self.ring.size_bytes <= 8 * RECORD_BYTES or len(self.ring) == 1

    @invariant()
    def accounts_for_what_it_holds(self) -> None:
        assert self.ring.size_bytes == sum(record.size_bytes for record in self.ring.newest())


TestRing = RingMachine.TestCase


class JournalMachine(RuleBasedStateMachine):
    """Any order of what can be heard, of requests and starts that may not exist."""

    requests = st.sampled_from([f"q{number}" for number in range(6)])
    replicas = st.sampled_from(["r1", "r2", "r3"])
    states = st.sampled_from(list(ReplicaState))

    def __init__(self) -> None:
        super().__init__()
        self.journal = journal(4)
        self.now = 0.0

    def tick(self) -> float:
        self.now += 0.125
        return self.now

    @rule(request=requests)
    def pick(self, request: str) -> None:
        now = self.tick()
        self.journal.picked(request, picked(now, now))

    @rule(request=requests)
    def hold(self, request: str) -> None:
        held(self.journal, request, self.tick())

    @rule(request=requests)
    def release(self, request: str) -> None:
        self.journal.released(request, PICK, (), self.tick())

    @rule(request=requests)
    def leave(self, request: str) -> None:
        self.journal.left("m", request, self.tick())

    @rule(request=requests)
    def refuse(self, request: str) -> None:
        now = self.tick()
        refusal = Refusal("X", "x", 14, 1.0)
        self.journal.refused(request, refusal, name="m", began="", model="m", revision="", arrived_at=now, now=now)

    @rule(request=requests, key=replicas, ago=st.floats(-5, 5))
    def arrive(self, request: str, key: str, ago: float) -> None:
        now = self.tick()
        self.journal.arrived(request, key, WALL + now - ago, now)

    @rule(request=requests, reached=st.sampled_from(["", "r2"]), first_at=st.none() | st.floats(-5, 5))
    def move_on(self, request: str, reached: str, first_at: float | None) -> None:
        now = self.tick()
        self.journal.moved_on(request, moved(reached, at=now), now + first_at if first_at is not None else None)

    @rule(request=requests, first=st.none() | st.floats(0, 2), duration=st.floats(2, 5))
    def finish(self, request: str, first: float | None, duration: float) -> None:
        self.journal.finished(request, finished(first=first, duration=duration, heard_at=self.tick()))

    @rule()
    def delay(self) -> None:
        self.journal.start_delayed("m", "no room", self.tick())

    @rule(key=replicas)
    def begin(self, key: str) -> None:
        self.journal.start_begun("m", key, "w", "fits", self.tick())

    @rule()
    def fail(self) -> None:
        self.journal.start_failed("m", "NO_CAPACITY", self.tick())

    @rule(key=replicas, state=states, ago=st.floats(-5, 5))
    def change(self, key: str, state: ReplicaState, ago: float) -> None:
        now = self.tick()
        told = replace(replica(key, state=state), phases=PHASES, created_at=WALL + now - ago)
        self.journal.replica_changed(told, now)

    @rule()
    def publish(self) -> None:
        self.journal.published(frozenset({"127.0.0.1:1000"}), self.tick())

    @invariant()
    def every_explanation_adds_up(self) -> None:
        for record in self.journal.recent():
            phases = record.phases(self.now)
            assert record.explained_seconds(self.now) >= 0
            assert sum(phase.seconds for phase in phases) == pytest.approx(record.explained_seconds(self.now), abs=1e-5)
            assert all(phase.seconds > 0 for phase in phases)
            for start in record.hold.starts if record.hold is not None else ():
                assert all(phase.seconds > 0 for phase in self.journal.start_phases(start, self.now))

    @invariant()
    def keeps_within_its_bounds(self) -> None:
        assert self.journal.statistics()[0] <= 4


TestJournal = JournalMachine.TestCase


def test_each_phase_that_a_worker_measures_has_its_reason() -> None:
    """A phase is a word in a call; `helios why` says what it means."""
    sources = (Path(worker.__file__ or "").parent).rglob("*.py")
    call = re.compile(r'(?:\b_?phase|add_phase|write_phase)\((?:[\w.]+, )?"(\w+)"')
    measured = {name for source in sources for name in call.findall(source.read_text())}
    assert {"fork", "fetch_artifact", "load", "warm_up", "serve"} <= measured
    start = Start("m", 0.0, ordered_at=0.0, ready_at=100.0)
    start.phases = tuple((name, 1.0) for name in sorted(measured))
    reasons = {segment.phase: segment.reason for segment in start.segments(100.0)}
    assert [name for name in sorted(measured) if not reasons[name]] == []
