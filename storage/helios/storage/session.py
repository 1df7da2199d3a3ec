"""One Materialize stream as a state machine; the servicer executes its actions.

    WANT ──want──▶ FETCHING ──lent──▶ LENT ──renew──▶ LENT
      │               │ release         │ release, lease ended
      │ other, end    │ failed          │ stream ended
      ▼               ▼                 ▼
    CLOSED ◀──────── CLOSED ◀───────── CLOSED

The client's end of the stream while FETCHING changes nothing: a client that has said all it will say still gets its
answer. The end of the stream never ends a lease; only release does.
"""

from dataclasses import dataclass
from datetime import timedelta
from enum import Enum, auto

from helios.mesh.errors import HeliosError, InvalidRequest, NotFound


@dataclass(frozen=True, slots=True)
class Want:
    """The client wants a revision; `lease_id` is empty for a new lease, `ttl` None for the default."""

    revision: str
    ttl: timedelta | None
    lease_id: str
    holder: str


@dataclass(frozen=True, slots=True)
class Renew:
    """The client keeps the lease."""


@dataclass(frozen=True, slots=True)
class Release:
    """The client ends the lease."""


@dataclass(frozen=True, slots=True)
class ClientDone:
    """The client says no more."""


@dataclass(frozen=True, slots=True)
class Lent:
    """The revision is there, under this lease."""

    lease_id: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The revision could not be materialised."""

    error: HeliosError


@dataclass(frozen=True, slots=True)
class LeaseEnded:
    """The lease came to its end, unrenewed."""


Event = Want | Renew | Release | ClientDone | Lent | Failed | LeaseEnded


@dataclass(frozen=True, slots=True)
class StartFetch:
    """Materialise this; answer with Lent or Failed."""

    want: Want


@dataclass(frozen=True, slots=True)
class SendReady:
    """Tell the client where the revision is."""


@dataclass(frozen=True, slots=True)
class RenewLease:
    """Renew this lease, and tell the client its new end."""

    lease_id: str


@dataclass(frozen=True, slots=True)
class ReleaseLease:
    """End this lease."""

    lease_id: str


@dataclass(frozen=True, slots=True)
class Close:
    """End the stream, cancelling a fetch that runs; with an error when there is one."""

    error: HeliosError | None = None


Action = StartFetch | SendReady | RenewLease | ReleaseLease | Close


class State(Enum):
    """Where a stream stands."""

    WANT = auto()
    FETCHING = auto()
    LENT = auto()
    CLOSED = auto()


class MaterializeSession:
    """The state of one stream. Pure."""

    def __init__(self) -> None:
        self.state = State.WANT
        self._lease_id = ""
        self._is_client_done = False

    def handle(self, event: Event) -> list[Action]:
        """Takes an event and returns what to do, in order; a closed session does nothing."""
        match self.state:
            case State.WANT:
                return self._while_wanting(event)
            case State.FETCHING:
                return self._while_fetching(event)
            case State.LENT:
                return self._while_lent(event)
            case State.CLOSED:
                return []

    def _while_wanting(self, event: Event) -> list[Action]:
        if isinstance(event, Want):
            self.state = State.FETCHING
            return [StartFetch(event)]
        return self._close(InvalidRequest("the first message is a want", reason="WANT_EXPECTED"))

    def _while_fetching(self, event: Event) -> list[Action]:
        match event:
            case Lent(lease_id):
                self.state, self._lease_id = State.LENT, lease_id
                return [SendReady(), *(self._close(None) if self._is_client_done else [])]
            case Failed(error):
                return self._close(error)
            case Release():
                return self._close(None)
            case ClientDone():
                self._is_client_done = True
                return []
            case Renew():
                # There is nothing to renew yet, and nothing to lose.
                return []
        return self._close(_second_want())

    def _while_lent(self, event: Event) -> list[Action]:
        match event:
            case Renew():
                return [RenewLease(self._lease_id)]
            case Release():
                return [ReleaseLease(self._lease_id), *self._close(None)]
            case ClientDone():
                return self._close(None)
            case LeaseEnded():
                return self._close(NotFound("the lease came to its end", reason="LEASE_NOT_FOUND"))
            case Failed(error):
                return self._close(error)
        return self._close(_second_want())

    def _close(self, error: HeliosError | None) -> list[Action]:
        self.state = State.CLOSED
        return [Close(error)]


def _second_want() -> InvalidRequest:
    return InvalidRequest("a stream wants one revision", reason="WANT_UNEXPECTED")
