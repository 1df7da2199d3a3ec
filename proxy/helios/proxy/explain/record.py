"""What is noted of one request while it passes, and its phases, laid out when somebody asks. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Final, NamedTuple

from helios.proxy.explain.timeline import Phase, Segment, clip, lay_out

if TYPE_CHECKING:
    from helios.proxy.explain.start import Start
    from helios.proxy.routing.pick import Pick

# A record, its ids, its pick: measured with tracemalloc at 900 bytes for one candidate.
RECORD_BYTES: Final = 1024
# The newest of one that moves on and on.
_MOVE_COUNT: Final = 16
MOVE_BYTES: Final = 512
_UNAVAILABLE: Final = 14
# A clock that is further off than this says nothing.
_SANE_SECONDS: Final = 3600.0
# A replica that has not spoken of a request by then never got it.
_SENT_SECONDS: Final = 60.0


class RequestState(enum.Enum):
    """What became of a request; the values are the contract's."""

    HELD = 1
    SENT = 2
    RUNNING = 3
    FINISHED = 4
    REFUSED = 5
    LEFT = 6


@dataclass(frozen=True, slots=True)
class Refusal:
    """What the client was told."""

    reason: str
    message: str
    grpc_code: int
    retry_after_seconds: float | None


@dataclass(slots=True)
class HoldFacts:
    """A wait for a replica. `released_at` is None while it lasts, and where it did not end in a release."""

    since: float
    why: str
    starts: list[Start]
    released_at: float | None = None


@dataclass(frozen=True, slots=True)
class Arrived:
    """A request is at a replica; `at` is the replica's wall clock, brought to this process's; None: it did not say."""

    replica_id: str
    at: float | None
    heard_at: float


class Finished(NamedTuple):
    """How a request ended at its replica; durations count from its arrival there. A tuple, made per request."""

    replica_id: str
    status_code: int
    prompt_tokens: int
    completion_tokens: int
    time_to_first_token_seconds: float | None
    duration_seconds: float
    heard_at: float


@dataclass(frozen=True, slots=True)
class Move:
    """A durable answer left a replica.

    Attributes:
        left: the replica, or its address where it is not known any more.
        reached: where the answer went on; empty: nowhere.
        is_drain: the first one drains and was left; else it broke off.
        reason: with what it broke off, and, where nothing went on, why.
        token_count: tokens that the client had by then.
        waited_seconds: for how long nobody worked on it.
        at: when this was told.
    """

    left: str
    reached: str
    is_drain: bool
    reason: str
    token_count: int
    waited_seconds: float
    at: float


class Record:
    """One request. Times are monotonic seconds of this process.

    A plain class with slots, because one is made on the path of every pick; who learns more sets it later.

    Attributes:
        began: when Envoy began with it, as the text of its attribute `request.time`; parsed when somebody asks.
        wall_offset: wall clock less monotonic clock, when it arrived.
        arrived: at the replica that has it now; `first_arrived` at the first one.
        moves: where the relay took its answer on.
        first_told_at: when the client had the first token, where the relay said so.
    """

    __slots__ = (
        "answered_at", "arrived", "arrived_at", "began", "excluded", "finished", "first_arrived", "first_told_at",
        "hold", "left_at", "model", "moves", "name", "pick", "refusal", "request_id", "revision", "size_bytes",
        "wall_offset",
    )  # fmt: skip

    def __init__(self, request_id: str, name: str, began: str, arrived_at: float, wall_offset: float) -> None:
        self.request_id = request_id
        self.name = name
        self.began = began
        self.arrived_at = arrived_at
        self.wall_offset = wall_offset
        self.size_bytes = RECORD_BYTES
        self.model = ""
        self.revision = ""
        self.answered_at: float | None = None
        self.pick: Pick | None = None
        self.excluded: tuple[tuple[str, str], ...] = ()
        self.hold: HoldFacts | None = None
        self.refusal: Refusal | None = None
        self.left_at: float | None = None
        self.arrived: Arrived | None = None
        self.first_arrived: Arrived | None = None
        self.moves: tuple[Move, ...] = ()
        self.first_told_at: float | None = None
        self.finished: Finished | None = None

    @property
    def state(self) -> RequestState:
        """What became of it."""
        if self.finished is not None:
            return RequestState.FINISHED
        if self.refusal is not None:
            return RequestState.REFUSED
        if self.arrived is not None:
            return RequestState.RUNNING
        if self.left_at is not None:
            return RequestState.LEFT
        return RequestState.SENT if self.pick is not None else RequestState.HELD

    @property
    def began_at(self) -> float:
        """When Envoy began with it; its arrival here where Envoy did not say, or where the clocks contradict."""
        try:
            began = datetime.fromisoformat(self.began).timestamp() - self.wall_offset
        except ValueError:
            return self.arrived_at
        return began if 0.0 <= self.arrived_at - began < _SANE_SECONDS else self.arrived_at

    def moved(self, move: Move, first_told_at: float | None) -> None:
        """The relay took its answer on, or found nobody who could."""
        self.moves = (*self.moves[1 - _MOVE_COUNT :], move)
        if self.first_told_at is None:
            self.first_told_at = first_told_at
        arrival = self._arrival(self.arrived)
        if not move.reached and self.finished is None and arrival is not None:
            # Whoever broke it off may never tell of its end.
            duration = max(0.0, move.at - arrival)
            self.finished = Finished(move.left, _UNAVAILABLE, 0, move.token_count, None, duration, move.at)

    @property
    def replica_arrival(self) -> float | None:
        """When it reached its replica, of several the one that brought the first token."""
        is_first = self.first_told_at is not None and self.first_arrived is not None
        return self._arrival(self.first_arrived if is_first else self.arrived)

    def _arrival(self, arrived: Arrived | None) -> float | None:
        """When it was at a replica, cut to what is possible: between the answer here and the news of it."""
        if self.answered_at is None:
            return None
        if arrived is not None:
            heard, at = arrived.heard_at, arrived.at
        elif self.finished is not None:
            heard, at = self.finished.heard_at - self.finished.duration_seconds, None
        else:
            return None
        at = self.answered_at if at is None else at
        return min(max(at, self.answered_at), max(heard, self.answered_at))

    @property
    def first_token_at(self) -> float | None:
        """When its first token was there; None where there was none, or none yet."""
        arrival, finished = self.replica_arrival, self.finished
        if arrival is not None and self.first_told_at is not None:
            return max(arrival, self.first_told_at)
        if arrival is None or finished is None or finished.time_to_first_token_seconds is None:
            return None
        return arrival + finished.time_to_first_token_seconds

    @property
    def ended_at(self) -> float | None:
        """When it was over; None while it runs."""
        arrival = self._arrival(self.arrived)
        if self.finished is not None and arrival is not None:
            return arrival + self.finished.duration_seconds
        if self.refusal is not None:
            return self.answered_at
        return self.left_at

    def phases(self, now: float) -> tuple[Phase, ...]:
        """Where its time went, up to the first token; to its end where there was none; to now where it goes on."""
        return lay_out(self.began_at, self._explained_until(now), self._segments(now))

    def explained_seconds(self, now: float) -> float:
        """How long all phases take together."""
        return self._explained_until(now) - self.began_at

    def _explained_until(self, now: float) -> float:
        known = next((at for at in (self.first_token_at, self.ended_at) if at is not None), None)
        if known is not None:
            return known
        if self.state is RequestState.SENT and self.answered_at is not None:
            return min(now, self.answered_at + _SENT_SECONDS)
        return max(now, self.arrived_at)

    def _segments(self, now: float) -> list[Segment]:
        found = [Segment("edge", self.began_at, self.arrived_at, "Envoy took the request in, and asked where it goes")]
        left_at = next((at for at in (self.answered_at, self.left_at) if at is not None), now)
        decided_at = self.hold.since if self.hold is not None else left_at
        found.append(Segment("resolve", self.arrived_at, decided_at, self._resolved()))
        if self.hold is not None:
            found += self._held(self.hold, left_at, now)
        arrival = self.replica_arrival
        if self.answered_at is not None and self.refusal is None:
            sent_until = arrival if arrival is not None else now
            found.append(Segment("send", self.answered_at, sent_until, self._sent()))
        if arrival is not None:
            found += self._answered(arrival, now)
        return found

    def _resolved(self) -> str:
        if not self.model:
            return self.refusal.message if self.refusal is not None else ""
        if self.pick is not None and self.pick.split:
            return f"{self.name} is rolled out: {self.pick.split}; {self.model}, revision {self.revision[:19]}"
        alias = f"the alias '{self.name}' stands for {self.model}" if self.name != self.model else self.model
        return f"{alias}, revision {self.revision[:19]}"

    def _sent(self) -> str:
        return f"through Envoy to {self.pick.explain()}" if self.pick is not None else ""

    def _held(self, hold: HoldFacts, left_at: float, now: float) -> list[Segment]:
        covered = sorted((s for start in hold.starts for s in start.segments(now)), key=lambda s: s.begin)
        # Before anything is started for it, a request waits: for an acknowledgement, a breaker, the fleet.
        begin = covered[0].begin if covered else left_at
        return [Segment("hold", hold.since, min(begin, left_at), hold.why), *clip(covered, hold.since, left_at)]

    def _answered(self, arrival: float, now: float) -> list[Segment]:
        first, ended = self.first_token_at, self.ended_at
        # What happened to it before it was at its replica, nobody here saw.
        way = f"at {self.pick.explain()}: " if self.pick is not None and self.pick.is_express else ""
        if first is not None:
            prompt = f"a prompt of {self.finished.prompt_tokens} tokens" if self.finished is not None else "the prompt"
            return [Segment("first_token", arrival, first, f"{way}{prompt}")]
        if ended is not None:
            return [Segment("answer", arrival, ended, f"{way}the replica's answer, without a token")]
        return [Segment("first_token", arrival, now, f"{way}the replica works on it")]
