"""The activation of one model: at most one start at a time, shared by everything that waits for it.

| state | event | next | actions |
|---|---|---|---|
| IDLE | Demanded | PLACING | Place |
| WAITING | Demanded | PLACING | Place |
| WAITING | Tick, waited for longer than wait_seconds, unless requests wait for room | IDLE | FailHolds |
| WAITING | Unneeded | IDLE | |
| PLACING | Placed | STARTING | |
| PLACING | Delayed | WAITING (keeps the time of its first wait) | |
| PLACING | Refused | IDLE | FailHolds |
| IDLE, WAITING | Adopted (a start of another proxy, or of this one before its restart) | STARTING | |
| STARTING | Ready of its replica | IDLE, failures forgotten | Measured |
| STARTING | Gone of its replica, which its worker refused to start | PLACING | Place |
| STARTING | Gone of its replica, worker lost, fewer than 3 in a row | PLACING | Place |
| STARTING | Gone of its replica, else | BACKING_OFF | FailHolds |
| STARTING | Withdrawn of its replica | IDLE | |
| STARTING | Tick, further than before | STARTING, and its time begins anew | |
| STARTING | Tick, no further for longer than its start_seconds | BACKING_OFF | Abandon, FailHolds |
| BACKING_OFF | Demanded before its end | BACKING_OFF | FailHolds, Retry-After the rest |
| BACKING_OFF | Demanded at or after its end, or by an operator where the failure is for good | PLACING | Place |
| BACKING_OFF | Changed | IDLE, failures forgotten | |
| any | Ready of another replica | the same, failures forgotten | |

A failure that is for good (the engine refuses the settings, does not know the architecture, can't load the checkpoint)
would come again at each try: its pause is `blocked_seconds`, and changing the model ends it.

PLACING ends within the same step: whoever executes Place answers with Placed, Delayed or Refused. Pure.
"""

import enum
from dataclasses import dataclass


class ActivationState(enum.Enum):
    """Where an activation stands."""

    IDLE = 1
    PLACING = 2
    WAITING = 3
    STARTING = 4
    BACKING_OFF = 5


@dataclass(frozen=True, slots=True)
class ActivationPolicy:
    """Times of an activation, in seconds.

    Attributes:
        wait_seconds: how long to wait for a worker or for room before holds fail.
        start_seconds: how long a start may get no further before it is given up, beside what its weights take.
        least_bytes_per_second: how slowly weights may be loaded: no fixed time is enough for every model.
        back_off_seconds: pause after the first failure; doubles with each further one.
        max_back_off_seconds: bound of the doubling.
        blocked_seconds: pause after a failure that is for good: workers may have changed by then.
    """

    wait_seconds: float = 30.0
    start_seconds: float = 300.0
    least_bytes_per_second: float = 64 << 20
    back_off_seconds: float = 1.0
    max_back_off_seconds: float = 60.0
    blocked_seconds: float = 600.0


@dataclass(frozen=True, slots=True)
class Demanded:
    """Something wants a replica; `by_operator`: somebody who may know that what stood in the way is gone."""

    by_operator: bool = False


@dataclass(frozen=True, slots=True)
class Changed:
    """The model is another one now: its revision, its settings, or what an operator asks of it."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed.

    Attributes:
        start_seconds: how long the start under way may get no further, None: as the policy says.
        is_held: requests wait for it. For room, they do until their own deadlines.
        progress: how far the start under way is; what is further compares as more.
    """

    start_seconds: float | None = None
    is_held: bool = False
    progress: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Placed:
    """A start command is on its way."""

    replica_id: str


@dataclass(frozen=True, slots=True)
class Adopted:
    """A replica is starting that this activation did not ask for."""

    replica_id: str


@dataclass(frozen=True, slots=True)
class Delayed:
    """There is no room yet."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Refused:
    """There is no room."""

    reason: str
    message: str
    retry_after_seconds: float


@dataclass(frozen=True, slots=True)
class Ready:
    """A replica of the model is ready."""

    replica_id: str


@dataclass(frozen=True, slots=True)
class Gone:
    """A replica of the model is gone. `is_refused`: its worker did not start it, for reasons of the worker's own."""

    replica_id: str
    reason: str
    message: str
    is_worker_lost: bool = False
    is_refused: bool = False


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """A replica is being stopped because it is not wanted any more: no failure of its own."""

    replica_id: str


@dataclass(frozen=True, slots=True)
class Unneeded:
    """Nothing asks for a replica any more, or there is one."""


Event = Demanded | Changed | Tick | Placed | Adopted | Delayed | Refused | Ready | Gone | Withdrawn | Unneeded


@dataclass(frozen=True, slots=True)
class Place:
    """Find room and start a replica."""


@dataclass(frozen=True, slots=True)
class FailHolds:
    """Answer everything that waits."""

    reason: str
    message: str
    retry_after_seconds: float


@dataclass(frozen=True, slots=True)
class Abandon:
    """Stop a replica that does not get ready."""

    replica_id: str


@dataclass(frozen=True, slots=True)
class Measured:
    """A start took this long."""

    replica_id: str
    seconds: float


Action = Place | FailHolds | Abandon | Measured

# Reasons that a next try would meet again: those of the worker's engines, and of a worker that has not the engine.
_PERMANENT_REASONS = frozenset(
    {
        "INVALID_ENGINE_SETTINGS",
        "UNSUPPORTED_ARCHITECTURE",
        "ADAPTERS_UNSUPPORTED",
        "BAD_ADAPTER",
        "BAD_CHECKPOINT",
        "UNKNOWN_ENGINE",
        "UNSUPPORTED_FORMAT",
        "INVALID_REQUEST",
    }
)

# A model whose start takes its worker down would otherwise take down one worker after the other.
_MAX_LOST_WORKERS = 3


def is_permanent(reason: str) -> bool:
    """Whether a start that failed for this reason fails again however often it is tried."""
    return reason in _PERMANENT_REASONS


class Activation:
    """One model's activation; `handle` decides, the caller acts.

    Invariants: `replica_id` is set exactly in STARTING; no Place comes out in STARTING or before the end of
    BACKING_OFF.
    """

    def __init__(self, policy: ActivationPolicy) -> None:
        self._policy = policy
        self.state = ActivationState.IDLE
        self.replica_id: str | None = None
        self.since = 0.0
        self.failure_count = 0
        self.failure = ""
        self._progress: tuple[int, ...] = ()
        self._further_at = 0.0
        self._reason = ""
        self._until = 0.0
        self._waiting_since: float | None = None

    @property
    def is_failing(self) -> bool:
        """Whether the last start failed."""
        return self.failure_count > 0

    @property
    def is_blocked(self) -> bool:
        """Whether the last start failed for good, as far as is known."""
        return self.state is ActivationState.BACKING_OFF and is_permanent(self._reason)

    @property
    def waits_for_room(self) -> bool:
        """Whether a start waits for memory that others have, and not for a worker to come."""
        return self.state is ActivationState.WAITING and self._reason == "NO_CAPACITY"

    def elapsed_seconds(self, now: float) -> float:
        """How long the start has been going on; 0 outside STARTING."""
        return now - self.since if self.state is ActivationState.STARTING else 0.0

    def back_off_remaining_seconds(self, now: float) -> float:
        """How long no start will be tried; 0 outside BACKING_OFF."""
        return max(0.0, self._until - now) if self.state is ActivationState.BACKING_OFF else 0.0

    def handle(self, event: Event, now: float) -> list[Action]:
        """Takes in an event; `now` is in monotonic seconds."""
        match event:
            case Demanded(by_operator):
                return self._demanded(now, by_operator=by_operator)
            case Tick(start_seconds, is_held, progress):
                start_seconds = self._policy.start_seconds if start_seconds is None else start_seconds
                if progress > self._progress:
                    self._progress, self._further_at = progress, now
                return self._tick(now, start_seconds, is_held=is_held)
            case Placed(replica_id):
                assert self.state is ActivationState.PLACING
                return self._starting(replica_id, now)
            case Adopted(replica_id):
                is_free = self.state in (ActivationState.IDLE, ActivationState.WAITING)
                return self._starting(replica_id, now) if is_free else []
            case Delayed(reason, message):
                # Each thing that is waited for has its own time: a worker that is away for a moment comes back.
                if self._waiting_since is None or reason != self._reason:
                    self._waiting_since = now
                self.state, self._reason, self.failure = ActivationState.WAITING, reason, message
                return []
            case Refused(reason, message, retry_after_seconds):
                self._rest()
                return [FailHolds(reason, message, retry_after_seconds)]
            case Ready(replica_id):
                return self._ready(replica_id, now)
            case Gone():
                return self._gone(event, now)
            case Withdrawn() | Changed() | Unneeded():
                self._let_go(event)
                return []

    def _demanded(self, now: float, *, by_operator: bool) -> list[Action]:
        if self.state is ActivationState.BACKING_OFF:
            if now < self._until and not (by_operator and self.is_blocked):
                return [FailHolds(self._reason, self.failure, max(1.0, self._until - now))]
            return self._place()
        return self._place() if self.state in (ActivationState.IDLE, ActivationState.WAITING) else []

    def _tick(self, now: float, start_seconds: float, *, is_held: bool) -> list[Action]:
        if self.state is ActivationState.STARTING and now - self._further_at > start_seconds:
            assert self.replica_id is not None
            abandoned = self.replica_id
            message = f"the model's start got no further for {start_seconds:.0f} s"
            return [Abandon(abandoned), *self._fail("START_TIMEOUT", message, now)]
        if self.state is ActivationState.WAITING and not (is_held and self.waits_for_room):
            assert self._waiting_since is not None
            if now - self._waiting_since > self._policy.wait_seconds:
                reason, message = self._reason, self.failure
                self._rest()
                return [FailHolds(reason, message, self._policy.wait_seconds)]
        return []

    def _ready(self, replica_id: str, now: float) -> list[Action]:
        self.failure_count = 0
        if self.state is not ActivationState.STARTING or replica_id != self.replica_id:
            if self.state is ActivationState.BACKING_OFF:
                self._rest()
            return []
        seconds = now - self.since
        self._rest()
        return [Measured(replica_id, seconds)]

    def _gone(self, event: Gone, now: float) -> list[Action]:
        if self.state is not ActivationState.STARTING or event.replica_id != self.replica_id:
            return []
        if event.is_refused:
            # Whoever places it knows who refused a moment ago, so that ends.
            return self._place()
        if event.is_worker_lost and self.failure_count + 1 < _MAX_LOST_WORKERS:
            self.failure_count += 1
            return self._place()
        return self._fail(event.reason, event.message, now)

    def _let_go(self, event: Withdrawn | Changed | Unneeded) -> None:
        if isinstance(event, Unneeded):
            if self.state is ActivationState.WAITING:
                self._rest()
        elif isinstance(event, Changed):
            if self.state is ActivationState.BACKING_OFF:
                self.failure_count = 0
                self._rest()
        elif self.state is ActivationState.STARTING and event.replica_id == self.replica_id:
            self._rest()

    def _fail(self, reason: str, message: str, now: float) -> list[Action]:
        pause = min(self._policy.back_off_seconds * 2.0**self.failure_count, self._policy.max_back_off_seconds)
        if is_permanent(reason):
            pause = self._policy.blocked_seconds
        # 2 ** 30 seconds is far above any bound; more would overflow a float in the end.
        self.failure_count = min(self.failure_count + 1, 30)
        self._rest()
        self.state, self._until = ActivationState.BACKING_OFF, now + pause
        self._reason, self.failure = reason, message
        return [FailHolds(reason, message, max(1.0, pause))]

    def _place(self) -> list[Action]:
        self.state, self.replica_id = ActivationState.PLACING, None
        return [Place()]

    def _starting(self, replica_id: str, now: float) -> list[Action]:
        self.state, self.replica_id, self.since = ActivationState.STARTING, replica_id, now
        self._progress, self._further_at = (), now
        self._waiting_since = None
        return []

    def _rest(self) -> None:
        self.state, self.replica_id, self._waiting_since = ActivationState.IDLE, None, None
        self._reason, self.failure = "", ""
