"""What proxies tell each other. Immutable; times that travel are spans in seconds, or stamps of the sender's own clock.

A message says what changed since the one before it in the same session; the first one of a session says everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from helios.proxy.activation.machine import ActivationState


class SliceKey(NamedTuple):
    """Whose limits, and which; `number` tells a follower's slices of one key from those that it had before them."""

    key_id: str
    requests_per_minute: int
    tokens_per_minute: int
    number: int


@dataclass(frozen=True, slots=True)
class Spent:
    """What became of one slice in this session, in all: grows only, so that what comes twice changes nothing.

    Attributes:
        wanted: what it would have been granted in all, to have as much as it needs.
        used: of what was granted, what requests took or were answered for.
        owed: what requests took beyond what they had reserved.
        returned: of what was granted, what is given back unused.
    """

    wanted: int = 0
    used: int = 0
    owed: int = 0
    returned: int = 0


@dataclass(frozen=True, slots=True)
class SliceReport:
    """What a follower did with its slices of a key's limits."""

    key: SliceKey
    requests: Spent
    tokens: Spent


@dataclass(frozen=True, slots=True)
class Granted:
    """What a follower may use of one limit.

    Attributes:
        granted: in all, in this session.
        remaining: what the leader could still grant.
        reset_seconds: when all of the limit is there again, if nothing more is used.
        wait_seconds: how long to wait for what is wanted and was not granted; 0: all was.
        is_reclaimed: others want some: what is not needed is to be given back.
    """

    granted: int = 0
    remaining: int = 0
    reset_seconds: float = 0.0
    wait_seconds: float = 0.0
    is_reclaimed: bool = False


@dataclass(frozen=True, slots=True)
class SliceGrant:
    """A key's slices, as the leader grants them."""

    key: SliceKey
    requests: Granted
    tokens: Granted


@dataclass(frozen=True, slots=True)
class Hello:
    """How a follower introduces itself.

    Attributes:
        proxy_id: its name, which its next run has, too.
        incarnation: different for each run.
        epoch: the highest that it has heard of.
        address: where it is reached.
    """

    proxy_id: str
    incarnation: str
    epoch: int
    address: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """What a follower says.

    Attributes:
        sent_at: its clock.
        heard_at: the `sent_at` of the last news that it took in; 0: none.
        held: requests that wait there, by model; 0: none any more.
        used: models that it sent requests for, and how many seconds ago the last one was.
        wished: models that are to be started where there is room, though nobody waits.
        slices: what changed of its slices.
    """

    sent_at: float
    heard_at: float
    held: tuple[tuple[str, int], ...] = ()
    used: tuple[tuple[str, float], ...] = ()
    wished: tuple[str, ...] = ()
    slices: tuple[SliceReport, ...] = ()


@dataclass(frozen=True, slots=True)
class Outlook:
    """What the leader expects of a model; `state` is its activation's, `failure` why it fails, where it does."""

    model: str
    state: ActivationState
    remaining_seconds: float
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Failure:
    """A start failed: those who wait for the model are to be told so."""

    model: str
    reason: str
    message: str
    retry_after_seconds: float


@dataclass(frozen=True, slots=True)
class News:
    """What the leader says.

    Attributes:
        epoch: in which it leads.
        sent_at: its clock.
        heard_at: the `sent_at` of the last report that it took in; 0: none.
        draining: replicas that it takes out, all of them; None: as before.
        outlooks: models whose outlook changed.
        failures: starts that failed.
        estimates: how long models take to start, in seconds, as far as was measured.
        slices: what changed of the slices.
        forgotten: models that were let go and not used since, and how many seconds ago.
    """

    epoch: int
    sent_at: float
    heard_at: float
    draining: tuple[str, ...] | None = None
    outlooks: tuple[Outlook, ...] = ()
    failures: tuple[Failure, ...] = ()
    estimates: tuple[tuple[str, float], ...] = ()
    slices: tuple[SliceGrant, ...] = ()
    forgotten: tuple[tuple[str, float], ...] = ()

    @property
    def has_content(self) -> bool:
        """Whether it says more than that the leader is there."""
        lists = (self.outlooks, self.failures, self.estimates, self.slices, self.forgotten)
        return self.draining is not None or any(lists)
