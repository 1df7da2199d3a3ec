"""Limits of keys, shared by several proxies: the leader grants slices, and takes unused ones back. Pure.

What is granted is reserved in the leader's bucket until its use is told, and drains only from then on, so the bucket's
own bound holds for all proxies together: within any window of w seconds, capacity + rate x w.

    follower                                leader
    needs (a request waits) ── wanted ────▶ reserves in its bucket
    spends               ◀──── granted ────
    settles                 ── used ──────▶ settles: drains from now on
    has no use for it       ── returned ──▶ settles for nothing
    is gone, or silent                      settles as used, once the follower can't use it any more

A follower may use a slice for `VALID_SECONDS` after it sent the last report that the leader is known to have heard; the
leader counts from when it heard it, which is later. So neither needs the other's clock.

A leader that is new in a mesh knows nothing of what was used: it begins with all of every limit used up, which drains
as if it had been, and what the leader before it had granted runs out by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from helios.proxy.admission.bucket import Bucket
from helios.proxy.admission.keyring import Caller
from helios.proxy.admission.slice import Slice, Validity
from helios.proxy.peers.messages import Granted, SliceGrant, SliceKey, SliceReport, Spent

VALID_SECONDS: Final = 4.0
"""How long a slice is good after the leader was heard. Four: a leader that is busy for a second or two takes nobody's
limit away, and what a dead proxy had counts as used for no longer."""

Buckets = tuple[Bucket | None, Bucket | None]


class Slices:
    """A follower's slices, of one session with a leader."""

    def __init__(self) -> None:
        self._validity = Validity()
        self._slices: dict[SliceKey, tuple[Slice | None, Slice | None]] = {}
        self._current: dict[str, SliceKey] = {}
        self._told: dict[SliceKey, tuple[Spent, Spent]] = {}
        self._changed: set[SliceKey] = set()
        self._number = 0

    def open(self, caller: Caller) -> tuple[Slice | None, Slice | None]:
        """Makes the slices of a key: of requests, and of tokens. None where it has no such limit."""
        self._number += 1
        key = SliceKey(caller.key_id, caller.requests_per_minute, caller.tokens_per_minute, self._number)
        older = self._current.pop(caller.key_id, None)
        if older is not None:
            self._slices.pop(older, None)
            self._told.pop(older, None)
        self._current[caller.key_id] = key
        changed = partial(self._changed.add, key)
        requests = Slice(key.requests_per_minute, self._validity, changed) if key.requests_per_minute else None
        tokens = Slice(key.tokens_per_minute, self._validity, changed) if key.tokens_per_minute else None
        self._slices[key] = requests, tokens
        return requests, tokens

    def heard(self, own_stamp: float) -> None:
        """The leader has heard what was sent at `own_stamp`."""
        self._validity.until = max(self._validity.until, own_stamp + VALID_SECONDS)

    def is_valid(self, now: float) -> bool:
        """Whether slices may be used."""
        return now < self._validity.until

    def granted(self, grant: SliceGrant, now: float) -> None:
        """Takes a grant in."""
        requests, tokens = self._slices.get(grant.key, (None, None))
        for part, told in ((requests, grant.requests), (tokens, grant.tokens)):
            if part is not None:
                part.granted(told, now)
                if told.is_reclaimed:
                    part.reclaim()

    def follow(self) -> None:
        """Gives back what is not used; to be called about every second."""
        for pair in self._slices.values():
            for part in pair:
                if part is not None:
                    part.follow()

    def is_refused(self, key_id: str) -> bool:
        """Whether the leader has said that what a key's request needs will not be there soon."""
        pair = self._slices.get(self._current.get(key_id, _NOBODY), (None, None))
        return any(part is not None and part.is_refused for part in pair)

    @property
    def has_changes(self) -> bool:
        """Whether there may be something to report."""
        return bool(self._changed)

    def changes(self) -> tuple[SliceReport, ...]:
        """What is to be reported since the last call."""
        found: list[SliceReport] = []
        changed = list(self._changed)
        self._changed.clear()
        for key in changed:
            requests, tokens = self._slices.get(key, (None, None))
            spent = (_spent(requests), _spent(tokens))
            if self._told.get(key, (Spent(), Spent())) != spent:
                self._told[key] = spent
                found.append(SliceReport(key, *spent))
        return tuple(found)


@dataclass(slots=True)
class _Share:
    """What one follower has of one bucket, in one session."""

    bucket: Bucket
    granted: int = 0
    seen: Spent = field(default_factory=Spent)
    is_reclaimed: bool = False

    @property
    def outstanding(self) -> int:
        """What is reserved for it."""
        return self.granted - self.seen.used - self.seen.returned

    @property
    def missing(self) -> int:
        """What it wants beyond what it has."""
        return max(0, self.seen.wanted - self.granted)

    def report(self, spent: Spent, now: float) -> None:
        """Takes in what became of it."""
        used = min(max(0, spent.used - self.seen.used), self.outstanding)
        returned = min(max(0, spent.returned - self.seen.returned), self.outstanding - used)
        self.bucket.settle(used + returned, used + max(0, spent.owed - self.seen.owed), now)
        self.seen = spent

    def grant(self, now: float) -> None:
        """Grants what there is of what it wants."""
        amount = min(self.missing, self.bucket.remaining(now))
        if amount > 0 and not self.bucket.reserve(amount, now):
            self.granted += amount

    def give_up(self, now: float) -> None:
        """Counts as used whatever is not known to have been given back."""
        self.bucket.settle(self.outstanding, self.outstanding, now)


Shares = dict[SliceKey, tuple[_Share | None, _Share | None]]


@dataclass(slots=True)
class _Session:
    """One follower's: what it has, what it was told of that, what to look at, and the newest slices of each key."""

    shares: Shares = field(default_factory=dict)
    told: dict[SliceKey, SliceGrant] = field(default_factory=dict)
    due: set[SliceKey] = field(default_factory=set)
    keys: dict[str, SliceKey] = field(default_factory=dict)


class Escrow:
    """The leader's slices.

    Invariant: what is granted and neither used nor returned is reserved in its bucket.
    """

    def __init__(self, buckets: Callable[[SliceKey, float], Buckets]) -> None:
        """``buckets`` are those of a key at this proxy."""
        self._buckets = buckets
        self._sessions: dict[str, _Session] = {}
        self._ending: list[tuple[float, Shares]] = []

    def begin(self, session: str) -> None:
        """A follower's session begins."""
        self._sessions[session] = _Session()

    def end(self, session: str, heard_at: float) -> None:
        """A session is over; its follower was last heard then, and may use what it has for a while after that."""
        over = self._sessions.pop(session, None)
        if over is not None and over.shares:
            self._ending.append((heard_at + VALID_SECONDS, over.shares))

    def tick(self, now: float) -> None:
        """Counts as used what followers had that are gone."""
        over = [shares for until, shares in self._ending if until <= now]
        self._ending = [(until, shares) for until, shares in self._ending if until > now]
        for shares in over:
            for share in _all(shares):
                share.give_up(now)

    def report(self, session: str, reports: Iterable[SliceReport], now: float) -> None:
        """Takes in what a follower did with its slices, and what it wants."""
        one = self._sessions[session]
        for report in reports:
            pair = one.shares.get(report.key)
            if pair is None:
                pair = self._open(one, report.key, now)
            for share, bucket in zip(pair, self._buckets(report.key, now), strict=True):
                if share is not None and bucket is not None and not share.outstanding:
                    # The account was forgotten as idle meanwhile: this proxy counts in another bucket now.
                    share.bucket = bucket
            one.due.add(report.key)
            for share, spent in zip(pair, (report.requests, report.tokens), strict=True):
                if share is not None:
                    share.report(spent, now)

    def take(self, session: str, now: float) -> tuple[SliceGrant, ...]:
        """Grants what there is; returns what is to be told of it since the last call."""
        one, found = self._sessions[session], []
        for key in list(one.due):
            pair = one.shares[key]
            for share in pair:
                if share is not None and share.missing:
                    share.grant(now)
                    if share.missing:
                        self._reclaim(key, share)
            if not any(share is not None and share.missing for share in pair):
                one.due.discard(key)
            grant = SliceGrant(key, _granted(pair[0], now), _granted(pair[1], now))
            if _differs(grant, one.told.get(key)):
                one.told[key] = grant
                found.append(grant)
            for share in pair:
                if share is not None:
                    share.is_reclaimed = False
        return tuple(found)

    def _open(self, one: _Session, key: SliceKey, now: float) -> tuple[_Share | None, _Share | None]:
        older = one.keys.get(key.key_id)
        one.keys[key.key_id] = key
        if older is not None:
            # Its follower had forgotten it, or its limits are others now.
            one.due.discard(older)
            one.told.pop(older, None)
            for share in _all({older: one.shares.pop(older)}):
                share.give_up(now)
        requests, tokens = self._buckets(key, now)
        one.shares[key] = (_Share(requests) if requests else None, _Share(tokens) if tokens else None)
        return one.shares[key]

    def _reclaim(self, asking_key: SliceKey, asking: _Share) -> None:
        for one in self._sessions.values():
            key = one.keys.get(asking_key.key_id)
            if key is None:
                continue
            for share in one.shares[key]:
                if share is not None and share is not asking and share.bucket is asking.bucket and share.outstanding:
                    share.is_reclaimed = True
                    one.due.add(key)


def _all(shares: Shares) -> list[_Share]:
    return [share for pair in shares.values() for share in pair if share is not None]


def _spent(part: Slice | None) -> Spent:
    return part.spent() if part is not None else Spent()


def _granted(share: _Share | None, now: float) -> Granted:
    if share is None:
        return Granted()
    bucket = share.bucket
    wait_seconds = bucket.wait_seconds(share.missing, now) if share.missing else 0.0
    return Granted(
        share.granted, bucket.remaining(now), bucket.reset_seconds(now), wait_seconds, is_reclaimed=share.is_reclaimed
    )


def _differs(grant: SliceGrant, told: SliceGrant | None) -> bool:
    """Whether a grant is worth telling: what drains by itself is not news, until somebody waits for it."""
    if told is None:
        return True
    return any(
        new.granted != old.granted or new.is_reclaimed or new.wait_seconds > 0 or old.wait_seconds > 0
        for new, old in ((grant.requests, told.requests), (grant.tokens, told.tokens))
    )


_NOBODY: Final = SliceKey("", 0, 0, 0)
