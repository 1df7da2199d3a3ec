"""Notes what happens to requests and starts, as it happens, and answers what became of a request.

A note of a pick is a tuple of what it was made from, all of it immutable. It costs a microsecond, most of it for the
oldest note that gives way. Reasons are put into words, and intervals laid out, only when somebody asks. Pure: time is
passed in.

Memory is bounded: `Ring` for requests, and for starts the requests that refer to them, those under way, and no more.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from helios.proxy.explain.record import MOVE_BYTES, Arrived, Finished, HoldFacts, Move, Record, Refusal, RequestState
from helios.proxy.explain.ring import Picked, Ring
from helios.proxy.explain.start import Start, Wait
from helios.proxy.explain.timeline import Phase, lay_out

if TYPE_CHECKING:
    from helios.proxy.fleet.state import Replica
    from helios.proxy.routing.pick import Pick

# Starts under way; more are stale ones of workers that went away without a word.
_START_COUNT: Final = 1024
_FAILURE_COUNT: Final = 16
_WAIT_COUNT: Final = 16
# A start and its phases' reasons, which many records share.
_START_BYTES: Final = 2048
# Longer names are not models' (the registry refuses them).
_NAME_LENGTH: Final = 200


@dataclass(frozen=True, slots=True)
class JournalLimits:
    """Bounds of what is remembered of requests."""

    request_count: int = 4096
    total_bytes: int = 16 << 20


@dataclass(frozen=True, slots=True)
class FailedReplica:
    """A replica that failed; `at` is in monotonic seconds."""

    replica: Replica
    at: float


class Journal:
    """What happened. Times are monotonic seconds.

    Attributes:
        picked: notes that a request was sent at once; on the path of every request.
        on_phase: called once for each phase of each start: model, phase, seconds.
        on_split: called for each request of a model that is rolled out, when it has ended.
    """

    def __init__(self, limits: JournalLimits, *, wall_offset: float = 0.0) -> None:
        self._ring = Ring(limits.request_count, limits.total_bytes, wall_offset=wall_offset)
        self.picked: Callable[[str, Picked], None] = self._ring.note
        self._held: dict[str, dict[str, Record]] = {}
        self._moved: dict[str, str] = {}
        self._asking: dict[str, Start] = {}
        self._starts: OrderedDict[str, Start] = OrderedDict()
        self._failures: deque[FailedReplica] = deque(maxlen=_FAILURE_COUNT)
        self.on_phase: Callable[[str, str, float], None] = lambda model, phase, seconds: None
        self.on_split: Callable[[Pick, Finished], None] = lambda pick, finished: None

    @property
    def wall_offset(self) -> float:
        """Wall clock less monotonic clock; set by whoever has clocks, about once a second."""
        return self._ring.wall_offset

    @wall_offset.setter
    def wall_offset(self, offset: float) -> None:
        self._ring.wall_offset = offset

    # Requests.
    def held(  # noqa: PLR0913 - what a record begins with
        self, request_id: str, *, name: str, began: str, model: str, revision: str, why: str, arrived_at: float,
        now: float, is_continued: bool = False,
    ) -> None:  # fmt: skip
        """A request begins to wait. Call it before what the wait leads to is noted.

        ``is_continued``: its answer has begun elsewhere, and what is remembered of it stays; the relay tells the rest.
        """
        record = Record(request_id, name[:_NAME_LENGTH], began, arrived_at, self.wall_offset)
        record.model, record.revision = model, revision
        start = self._asking.get(model)
        if start is not None and start.replica_id:
            since = now - start.asked_at
            why = f"{why}; replica {start.replica_id} has been starting for {since:.1f} s"
        record.hold = HoldFacts(now, why, [start] if start is not None else [])
        record.size_bytes += len(why) + _START_BYTES
        self._held.setdefault(model, {})[request_id] = record
        if not is_continued:
            self._ring.put(record)

    def moved_on(self, request_id: str, move: Move, first_told_at: float | None) -> bool:
        """The relay took an answer from one replica to another; False where the request is not remembered here.

        ``first_told_at``: when the client had its first token; None: it had none.
        """
        record = self._ring.get(request_id)
        if record is None:
            return False
        record.moved(move, first_told_at)
        self._ring.grow(record, MOVE_BYTES)
        return True

    def moved(self, request_id: str, left: str, model: str, revision: str) -> None:
        """What a request waited for is gone, and it waits for another model now, under which it is looked for then."""
        record = self._unhold(left, request_id)
        if record is not None:
            record.model, record.revision = model, revision
            self._held.setdefault(model, {})[request_id] = record
            self._moved[request_id] = model

    def released(self, request_id: str, pick: Pick, excluded: tuple[tuple[str, str], ...], now: float) -> None:
        """A wait is over: a replica takes the request."""
        record = self._unhold(pick.model, request_id)
        if record is not None and record.hold is not None:
            record.pick, record.excluded, record.answered_at = pick, excluded, now
            record.hold.released_at = now

    def refused(self, request_id: str, refusal: Refusal, *, name: str, began: str, model: str, revision: str,
                arrived_at: float, now: float) -> None:  # fmt: skip
        """A request was answered with an error, at once or after a wait; `model` is empty where there is none."""
        record = self._ring.get(request_id)
        if record is None or record.answered_at is not None:
            record = Record(request_id, name[:_NAME_LENGTH], began, arrived_at, self.wall_offset)
            record.model, record.revision = model, revision
            self._ring.put(record)
        self._unhold(record.model, request_id)
        record.refusal, record.answered_at = refusal, now
        self._ring.grow(record, len(refusal.message))

    def left(self, model: str, request_id: str, now: float) -> None:
        """The client left while its request waited; nothing where the wait had ended otherwise."""
        record = self._unhold(model, request_id)
        if record is not None:
            record.left_at = now

    def arrived(self, request_id: str, replica_id: str, at_wall: float | None, now: float) -> None:
        """A replica says that a request reached it."""
        record = self._ring.get(request_id)
        if record is None:
            return
        last = record.finished
        if last is not None and last.replica_id != replica_id and last.status_code:
            # Envoy tried another one.
            record.finished = last = None
        if last is None:
            at = at_wall - self.wall_offset if at_wall is not None else None
            record.arrived = Arrived(replica_id, at, now)
            record.first_arrived = record.first_arrived or record.arrived

    def finished(self, request_id: str, finished: Finished) -> None:
        """A replica says how a request ended."""
        record = self._ring.get(request_id)
        if record is None:
            return
        last = record.finished
        # That of one which was left may be told after the arrival elsewhere.
        if last is not None and (not last.status_code or last.replica_id == finished.replica_id):
            return
        record.finished = finished
        if record.pick is not None and record.pick.split:
            self.on_split(record.pick, finished)
        has_begun = record.hold is not None and any(s.requested_by == request_id for s in record.hold.starts)
        if has_begun and finished.time_to_first_token_seconds is not None:
            self.on_phase(record.model, "first_token", finished.time_to_first_token_seconds)

    # Starts.
    def start_delayed(self, model: str, reason: str, now: float) -> None:
        """A start has to wait for room, or for a worker; the same reason again changes nothing."""
        start = self._asked(model, now)
        if len(start.waits) < _WAIT_COUNT and (not start.waits or start.waits[-1].reason != reason):
            start.waits.append(Wait(now, reason))

    def start_begun(self, model: str, replica_id: str, worker_id: str, placement: str, now: float) -> None:
        """A start command went out."""
        start = self._asked(model, now)
        start.replica_id, start.worker_id, start.placement, start.ordered_at = replica_id, worker_id, placement, now
        self._remember(start)

    def start_failed(self, model: str, failure: str, now: float) -> None:
        """What waited for a start was told that there will be none."""
        start = self._asking.pop(model, None)
        if start is not None and start.ended_at is None and start.ready_at is None:
            start.ended_at, start.failure = now, failure

    def replica_changed(self, replica: Replica, now: float) -> None:
        """A worker told of a replica."""
        if replica.state.name == "FAILED":
            self._failures.appendleft(FailedReplica(replica, now))
        start = self._starts.get(replica.replica_id)
        if start is None:
            # No request waits for one in the background.
            if replica.state.is_starting and not replica.is_background:
                self._adopt(replica, now)
            return
        if start.ready_at is None and start.ended_at is None:
            start.follow(replica, self.wall_offset)
            if replica.state.is_gone:
                reason = ": ".join(filter(None, (replica.failure_reason, replica.failure_message))) or "stopped"
                start.ended_at, start.failure = now, reason
            elif not replica.state.is_starting:
                start.ready_at = now
        if replica.state.is_gone:
            start.ended_at = now if start.ended_at is None else start.ended_at
            self._forget(start)

    def published(self, addresses: frozenset[str], now: float) -> None:
        """Every Envoy knows these endpoints."""
        for start in [s for s in self._starts.values() if s.ready_at is not None and s.address in addresses]:
            start.published_at = now
            self._forget(start)
            for phase in self.start_phases(start, now):
                self.on_phase(start.model, phase.phase, phase.seconds)

    def told(self, request_id: str, picked: Picked) -> str:
        """Envoy tells how it picked by itself; returns the replica that has told of the request; empty: none has."""
        record = self._ring.get(request_id)
        if record is None or record.pick is None or not record.pick.is_express:
            self.picked(request_id, picked)
            return ""
        replica_id = record.pick.choices[0].replica_id
        if record.pick.is_untold:
            record.pick = picked[1]
        return record.arrived.replica_id if record.arrived is not None else replica_id

    def knows(self, request_id: str) -> bool:
        """Whether a request is remembered."""
        return request_id in self._ring

    # Answers.
    def find(self, request_id: str) -> Record | None:
        """The record of a request; None where it was never seen, or too long ago."""
        return self._ring.get(request_id)

    def recent(self, *, names: frozenset[str] = frozenset(), state: RequestState | None = None) -> list[Record]:
        """Requests, the newest first; of models or asked-for names in `names`, and in a state, where given."""
        return [
            record
            for record in self._ring.newest()
            if (not names or record.model in names or record.name in names) and state in (None, record.state)
        ]

    @property
    def failures(self) -> tuple[FailedReplica, ...]:
        """Replicas that failed lately, the newest first."""
        return tuple(self._failures)

    @staticmethod
    def start_phases(start: Start, now: float) -> tuple[Phase, ...]:
        """A start's own phases."""
        segments = start.segments(now)
        return lay_out(segments[0].begin, start.end(now), segments) if segments else ()

    def statistics(self) -> tuple[int, int]:
        """How many requests are remembered, and bytes by their own account."""
        return len(self._ring), self._ring.size_bytes

    def _unhold(self, model: str, request_id: str) -> Record | None:
        model = self._moved.pop(request_id, model)
        waiting = self._held.get(model, {})
        record = waiting.pop(request_id, None)
        if not waiting:
            self._held.pop(model, None)
        return record

    def _asked(self, model: str, now: float) -> Start:
        """The start that the model asks for and that was not ordered yet; made where there is none."""
        start = self._asking.get(model)
        if start is not None and not start.replica_id:
            return start
        if start is not None and start.ready_at is None and start.ended_at is None:
            start.ended_at, start.failure = now, start.failure or "its worker went away"
            self._starts.pop(start.replica_id, None)
        waiting = self._held.get(model, {})
        first = next(iter(waiting.values()), None)
        start = Start(model, now)
        if first is not None and first.hold is not None:
            # A second start begins where the first one ended, not where the request came.
            is_first = not first.hold.starts
            start.asked_at = first.hold.since if is_first else now
            start.requested_by, start.cause = first.request_id, first.hold.why if is_first else "started again"
        else:
            start.cause = "asked for by a policy or an operator, not by a request"
        self._asking[model] = start
        for record in waiting.values():
            if record.hold is not None:
                record.hold.starts.append(start)
        return start

    def _adopt(self, replica: Replica, now: float) -> None:
        start = Start(replica.model, now, replica_id=replica.replica_id, worker_id=replica.worker_id, is_adopted=True)
        start.follow(replica, self.wall_offset)
        self._asking.setdefault(replica.model, start)
        self._remember(start)
        for record in self._held.get(replica.model, {}).values():
            if record.hold is not None:
                record.hold.starts.append(start)

    def _remember(self, start: Start) -> None:
        self._starts[start.replica_id] = start
        if len(self._starts) > _START_COUNT:
            self._forget(next(iter(self._starts.values())))

    def _forget(self, start: Start) -> None:
        self._starts.pop(start.replica_id, None)
        if self._asking.get(start.model) is start:
            del self._asking[start.model]
