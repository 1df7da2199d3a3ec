"""One stream as a machine."""

from hypothesis import given
from hypothesis import strategies as st

from helios.mesh.errors import DiskFull
from helios.storage.session import (
    ClientDone,
    Close,
    Event,
    Failed,
    LeaseEnded,
    Lent,
    MaterializeSession,
    Release,
    ReleaseLease,
    Renew,
    RenewLease,
    SendReady,
    StartFetch,
    State,
    Want,
)

WANT = Want("sha256:x", None, "", "holder")
EVENTS: list[Event] = [
    WANT,
    Renew(),
    Release(),
    ClientDone(),
    Lent("id"),
    Failed(DiskFull("full")),
    LeaseEnded(),
]


def reason(close: object) -> str:
    assert isinstance(close, Close)
    return close.error.reason if close.error else ""


def test_the_conversation() -> None:
    session = MaterializeSession()
    assert session.handle(WANT) == [StartFetch(WANT)]
    assert session.handle(Renew()) == []
    assert session.handle(Lent("id")) == [SendReady()]
    assert session.handle(Renew()) == [RenewLease("id")]
    assert session.handle(Release()) == [ReleaseLease("id"), Close()]
    assert session.handle(Renew()) == []


def test_a_failed_fetch_closes_with_its_error() -> None:
    session = MaterializeSession()
    session.handle(WANT)
    (close,) = session.handle(Failed(DiskFull("full")))
    assert reason(close) == "DISK_FULL"


def test_a_release_while_fetching_closes() -> None:
    session = MaterializeSession()
    session.handle(WANT)
    assert session.handle(Release()) == [Close()]


def test_an_ended_lease_closes() -> None:
    session = MaterializeSession()
    session.handle(WANT)
    session.handle(Lent("id"))
    (close,) = session.handle(LeaseEnded())
    assert reason(close) == "LEASE_NOT_FOUND"


@given(st.lists(st.sampled_from(EVENTS), max_size=12))
def test_closes_once_fetches_once_and_only_a_release_ends_a_lease(events: list[Event]) -> None:
    session = MaterializeSession()
    actions = [(event, action) for event in events for action in session.handle(event)]
    kinds = [type(action) for _, action in actions]
    assert kinds.count(Close) <= 1
    assert Close not in kinds[:-1]
    assert kinds.count(StartFetch) <= 1
    assert kinds.count(SendReady) <= 1
    assert all(isinstance(event, Release) for event, action in actions if isinstance(action, ReleaseLease))
    assert (session.state is State.CLOSED) == (Close in kinds)
    if events and events[0] != WANT:
        assert reason(actions[0][1]) == "WANT_EXPECTED"
