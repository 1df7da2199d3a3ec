"""A follower's side of the session with the leader: what it wants, and what it was told. Pure.

A follower picks and holds by itself; what it is told bears on what it answers those who wait, and which replicas it
leaves alone. With no leader it keeps what it was told last: whoever waits waits on, within the request's own deadline.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final

from helios.proxy.activation.machine import ActivationState
from helios.proxy.peers.escrow import VALID_SECONDS, Slices
from helios.proxy.peers.messages import Failure, News, Outlook, Report


@dataclass(frozen=True, slots=True)
class _Told:
    outlook: Outlook
    at: float


class Outlooks:
    """What the leader expects of models, as it said last."""

    def __init__(self) -> None:
        self._told: dict[str, _Told] = {}

    def take(self, outlook: Outlook, now: float) -> None:
        """Takes in what is said of a model."""
        if outlook.state == _IDLE and not outlook.failure:
            self._told.pop(outlook.model, None)
        else:
            self._told[outlook.model] = _Told(outlook, now)

    def clear(self) -> None:
        """Forgets everything."""
        self._told.clear()

    def state(self, model: str) -> ActivationState:
        """Where the model's activation stands."""
        told = self._told.get(model)
        return told.outlook.state if told is not None else _IDLE

    def failure(self, model: str) -> str:
        """Why its last start failed, as long as no other one is tried; else empty."""
        told = self._told.get(model)
        return told.outlook.failure if told is not None else ""

    def remaining_seconds(self, model: str, now: float) -> float | None:
        """How much longer its start takes; None where nothing was said of it."""
        told = self._told.get(model)
        return max(1.0, told.outlook.remaining_seconds - (now - told.at)) if told is not None else None


class Following:
    """One session with a leader, from a follower's side."""

    def __init__(self, slices: Slices, used_since: float, promised_until: float = 0.0) -> None:
        """``promised_until``: what was promised to the leader of the session before."""
        self.slices = slices
        self._held: dict[str, int] = {}
        self.used_since = used_since
        """Uses before are told already."""
        self._heard_stamp = 0.0
        self.has_heard = False
        """Whether the leader has said something in this session."""
        self.promised_until = promised_until
        """Until when this proxy does not ask for the lease: a leader counts on it."""

    def has_changes(self, held: dict[str, int], wished: Collection[str]) -> bool:
        """Whether there is something to say at once."""
        return self._held != held or bool(wished) or self.slices.has_changes

    def report(
        self, held: dict[str, int], last_used: Iterable[tuple[str, float]], wished: Iterable[str], now: float
    ) -> Report:
        """What is to be said now.

        Args:
            held: requests that wait here, by model.
            last_used: when each model was used last.
            wished: models that are to be started where there is room.
            now: monotonic seconds.
        """
        gone = tuple((model, 0) for model in self._held if model not in held)
        changed = tuple((model, count) for model, count in held.items() if self._held.get(model) != count)
        self._held = dict(held)
        used = tuple((model, now - at) for model, at in last_used if at >= self.used_since)
        self.used_since = now
        return Report(
            now,
            self._heard_stamp,
            held=changed + gone,
            used=used,
            wished=tuple(wished),
            slices=self.slices.changes(),
        )

    def heard(self, news: News, now: float) -> None:
        """Takes in what bears on this session."""
        self.has_heard = True
        self._heard_stamp, self.promised_until = news.sent_at, now + VALID_SECONDS
        if news.heard_at:
            self.slices.heard(news.heard_at)
        for grant in news.slices:
            self.slices.granted(grant, now)

    def answered(self, failure: Failure) -> None:
        """Those who waited for a model are told of a failure: the leader does not count them any more."""
        # A report on its way may have counted them again, so the next one says how many there are, if none.
        self._held[failure.model] = -1


_IDLE: Final = ActivationState.IDLE
