"""The one account of a replica's requests: what started, what finished, how it ended.

The proxy's counting (admission, breaker, usage) rests on these reports, so each request is reported as started once
and as finished once, whatever happened to it. Pure: time is passed in, nothing is sent from here.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from helios.worker.replica.engine import Meter
from helios.worker.replica.kv_losses import LossLog

# A supervisor that is away for a minute misses some thousand requests; beyond this the oldest reports are dropped.
_PENDING_LIMIT: Final = 10_000


@dataclass(frozen=True, slots=True)
class Finished:
    """How one request ended. Durations in seconds; ``status_code`` is gRPC's."""

    request_id: str
    status_code: int
    prompt_tokens: int
    completion_tokens: int
    time_to_first_token: float | None
    duration: float
    cached_prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Started:
    """A request that arrived, at a monotonic time."""

    request_id: str
    arrived_at: float


@dataclass(frozen=True, slots=True)
class Changes:
    """What happened since the last report."""

    started: Sequence[Started]
    finished: Sequence[Finished]


class RequestLedger:
    """Counts requests between reports. One event loop uses it; no method waits.

    Attributes:
        losses: What the KV cache lost of their prompts.
    """

    def __init__(self) -> None:
        self.losses = LossLog()
        self._started: deque[Started] = deque(maxlen=_PENDING_LIMIT)
        self._finished: deque[Finished] = deque(maxlen=_PENDING_LIMIT)
        self._running_count = 0
        self._generated_tokens = 0
        self._has_answered = False

    @property
    def has_answered(self) -> bool:
        """Whether a request has ended well."""
        return self._has_answered

    @property
    def running_count(self) -> int:
        """Requests that were started and have not finished."""
        return self._running_count

    @property
    def generated_tokens(self) -> int:
        """Tokens generated for finished requests since the replica started."""
        return self._generated_tokens

    def start(self, request_id: str, now: float) -> Meter:
        """Opens the account of a request; pass the meter to ``finish`` exactly once."""
        self._running_count += 1
        self._started.append(Started(request_id, now))
        return Meter(request_id, now)

    def finish(self, meter: Meter, status_code: int, now: float) -> Finished:
        """Closes the account of a request."""
        self._running_count -= 1
        self._generated_tokens += meter.completion_tokens
        self._has_answered = self._has_answered or status_code == 0
        first = None if meter.first_token_at is None else max(0.0, meter.first_token_at - meter.arrived_at)
        finished = Finished(
            meter.request_id,
            status_code,
            meter.prompt_tokens,
            meter.completion_tokens,
            first,
            now - meter.arrived_at,
            meter.cached_prompt_tokens,
        )
        self._finished.append(finished)
        return finished

    def take(self) -> Changes:
        """Returns what happened since the last call, and forgets it."""
        changes = Changes(tuple(self._started), tuple(self._finished))
        self._started.clear()
        self._finished.clear()
        return changes

    def give_back(self, changes: Changes) -> None:
        """Puts changes back that may not have arrived, ahead of what came since; the bound keeps the newest."""
        self._started = deque((*changes.started, *self._started), maxlen=_PENDING_LIMIT)
        self._finished = deque((*changes.finished, *self._finished), maxlen=_PENDING_LIMIT)
