"""The leader's side of the sessions with other proxies: what is wanted there, and what is to be told. Pure.

Requests that are held elsewhere count as held here (`Holds.elsewhere`), so everything that decides by what waits
decides by all of it. What followers are told is what changed of a few things that are cheap to look at, so nothing on
the way of a request knows of followers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, Protocol

from helios.proxy import actions
from helios.proxy.activation.machine import ActivationState
from helios.proxy.peers.escrow import VALID_SECONDS, Escrow
from helios.proxy.peers.messages import Failure, Hello, News, Outlook, Report

_LOOK_SECONDS: Final = 0.2
"""How often all models are looked at for a follower: ten thousand take some milliseconds."""
_LATER_SECONDS: Final = 1.0
"""How often an outlook is told anew that changed by nothing but time, where it is not as was expected."""
_MISSED_SECONDS: Final = 60.0
"""A proxy that was not heard of for so long is dead, as far as what it may have promised is concerned."""
_MOST_FAILURES: Final = 1024
"""Failures that a follower has not been told of; older ones go, and what waited for them waits for its deadline."""


class Expectations(Protocol):
    """What the leader knows of its models' starts. Cheap: asked for each model about which something may change."""

    def active_models(self) -> Iterable[str]:
        """Models with a start under way, or a failure."""
        ...

    def outlook(self, model: str, now: float) -> Outlook:
        """What is expected of a model."""
        ...

    def measured_seconds(self) -> dict[str, float]:
        """How long models take to start, as far as was measured."""
        ...

    def draining(self) -> frozenset[str]:
        """Replicas that are taken out."""
        ...

    def forgotten(self) -> dict[str, float]:
        """Models that were let go and not used since, and when."""
        ...


@dataclass(slots=True)
class _Follower:
    """One session, and what it was told."""

    proxy_id: str
    incarnation: str
    address: str
    heard_at: float
    heard_stamp: float = 0.0
    promised_until: float = 0.0
    held: dict[str, int] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    outlooks: dict[str, tuple[Outlook, float]] = field(default_factory=dict)
    estimates: dict[str, float] = field(default_factory=dict)
    draining: frozenset[str] | None = None
    forgotten: dict[str, float] = field(default_factory=dict)
    looked_at: float = -1.0


@dataclass(frozen=True, slots=True)
class _Missed:
    """A follower without a session since `at`; what its run had promised."""

    at: float
    incarnation: str
    promised_until: float


@dataclass(frozen=True, slots=True)
class Demands:
    """What a report asks of the leader: models to look at, models that were used, and such that are only wished for."""

    changed: tuple[str, ...] = ()
    used: tuple[tuple[str, float], ...] = ()
    wished: tuple[str, ...] = ()


class Followers:
    """All sessions with followers.

    Invariant: `held` is, by model, the sum of what those followers hold that have a session.
    """

    def __init__(self, escrow: Escrow, expectations: Expectations, on_held: Callable[[str, int], None]) -> None:
        """``on_held`` takes how many requests wait elsewhere for a model, whenever that changes."""
        self._escrow = escrow
        self._expectations = expectations
        self._on_held = on_held
        self._sessions: dict[str, _Follower] = {}
        self._missed: dict[str, _Missed] = {}
        self._next_session = 0

    def __len__(self) -> int:
        """How many sessions there are."""
        return len(self._sessions)

    def connect(self, hello: Hello, now: float) -> str:
        """A follower introduced itself; returns the name of its session. An older one of the same proxy ends."""
        for session in [key for key, one in self._sessions.items() if one.proxy_id == hello.proxy_id]:
            self.disconnect(session, now)
        self._next_session += 1
        session = f"{hello.proxy_id}/{self._next_session}"
        follower = self._sessions[session] = _Follower(hello.proxy_id, hello.incarnation, hello.address, now)
        missed = self._missed.pop(hello.proxy_id, None)
        if missed is not None and missed.incarnation == hello.incarnation:
            # It kept its promise meanwhile. Another run of it knows of none.
            follower.promised_until = missed.promised_until
        self._escrow.begin(session)
        return session

    def disconnect(self, session: str, now: float, *, is_leaving: bool = False) -> None:
        """A session is over; harmless where it was. `is_leaving`: its proxy stops, and promises nothing any more."""
        follower = self._sessions.pop(session, None)
        if follower is None:
            return
        self._escrow.end(session, follower.heard_at)
        if not is_leaving:
            self._missed[follower.proxy_id] = _Missed(now, follower.incarnation, follower.promised_until)
        for model in follower.held:
            self._count(model)

    def is_connected(self, session: str) -> bool:
        """Whether a session goes on."""
        return session in self._sessions

    def sessions(self) -> list[str]:
        """All sessions."""
        return list(self._sessions)

    def addresses(self) -> list[str]:
        """Where followers are reached."""
        return [one.address for one in self._sessions.values() if one.address]

    def report(self, session: str, report: Report, now: float) -> Demands:
        """Takes in what a follower says; returns what it asks for."""
        follower = self._sessions[session]
        follower.heard_at, follower.heard_stamp = now, report.sent_at
        if report.heard_at:
            follower.promised_until = report.heard_at + VALID_SECONDS
        for model, count in report.held:
            if count:
                follower.held[model] = count
            else:
                follower.held.pop(model, None)
            self._count(model)
        self._escrow.report(session, report.slices, now)
        return Demands(tuple(model for model, _ in report.held), report.used, report.wished)

    def failed(self, failure: actions.ActivationFailed) -> None:
        """A start failed; followers that hold requests for the model are told."""
        if not failure.held_count:
            return
        told = Failure(failure.model, failure.reason, failure.message, failure.retry_after_seconds)
        for follower in self._sessions.values():
            if failure.model in follower.held:
                # They are answered by this; whoever comes after them is told of anew.
                del follower.held[failure.model]
                follower.failures = [*follower.failures[1 - _MOST_FAILURES :], told]
        self._count(failure.model)

    def take(self, session: str, epoch: int, now: float) -> News:
        """What is to be told a follower now. It may be nothing but that the leader is there."""
        follower = self._sessions[session]
        failures, follower.failures = tuple(follower.failures), []
        is_look = now - follower.looked_at >= _LOOK_SECONDS
        follower.looked_at = now if is_look else follower.looked_at
        return News(
            epoch,
            now,
            follower.heard_stamp,
            draining=self._draining(follower),
            outlooks=self._outlooks(follower, now) if is_look else (),
            failures=failures,
            estimates=self._estimates(follower) if is_look else (),
            slices=self._escrow.take(session, now),
            forgotten=self._forgotten(follower, now) if is_look else (),
        )

    def tick(self, now: float) -> None:
        """Follows the time: sessions are over whose followers said nothing."""
        for session in [key for key, one in self._sessions.items() if now - one.heard_at > VALID_SECONDS]:
            self.disconnect(session, now)
        self._missed = {key: one for key, one in self._missed.items() if now - one.at <= _MISSED_SECONDS}
        self._escrow.tick(now)

    def promised_until(self) -> float:
        """Until when no other proxy leads, by the word of all that are known. Infinite where there is none."""
        if self._missed:
            return 0.0
        return min((one.promised_until for one in self._sessions.values()), default=float("inf"))

    def clear(self, now: float) -> None:
        """This proxy leads no more."""
        for session in self.sessions():
            self.disconnect(session, now, is_leaving=True)
        self._missed.clear()

    def _count(self, model: str) -> None:
        self._on_held(model, sum(one.held.get(model, 0) for one in self._sessions.values()))

    def _draining(self, follower: _Follower) -> tuple[str, ...] | None:
        draining = self._expectations.draining()
        if draining == follower.draining:
            return None
        follower.draining = draining
        return tuple(sorted(draining))

    def _outlooks(self, follower: _Follower, now: float) -> tuple[Outlook, ...]:
        active = set(self._expectations.active_models())
        found: list[Outlook] = []
        for model in active | follower.held.keys() | follower.outlooks.keys():
            outlook = self._expectations.outlook(model, now)
            told, told_at = follower.outlooks.get(model, (None, 0.0))
            if told is None or _is_news(outlook, told, now - told_at):
                follower.outlooks[model] = outlook, now
                found.append(outlook)
            if model not in active and model not in follower.held:
                # It is at rest, and told so.
                follower.outlooks.pop(model, None)
        return tuple(found)

    def _estimates(self, follower: _Follower) -> tuple[tuple[str, float], ...]:
        measured = self._expectations.measured_seconds()
        found = tuple((model, mean) for model, mean in measured.items() if follower.estimates.get(model) != mean)
        follower.estimates.update(found)
        return found

    def _forgotten(self, follower: _Follower, now: float) -> tuple[tuple[str, float], ...]:
        told, follower.forgotten = follower.forgotten, self._expectations.forgotten()
        return tuple((model, now - at) for model, at in follower.forgotten.items() if told.get(model) != at)


def _is_news(outlook: Outlook, told: Outlook, elapsed_seconds: float) -> bool:
    if (outlook.state, outlook.failure) != (told.state, told.failure):
        return True
    if outlook.state not in (ActivationState.STARTING, ActivationState.WAITING):
        return False
    is_expected = abs(told.remaining_seconds - elapsed_seconds - outlook.remaining_seconds) < 1.0
    return elapsed_seconds >= _LATER_SECONDS and not is_expected
