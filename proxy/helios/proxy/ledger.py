"""The ledger of requests: what was sent where, and what became of it.

What Envoy asks ends at the pick, so the proxy never sees a request arrive or end. A pick therefore *reserves* a place
at a replica, for a bounded time; the replica's deltas settle it (started, then finished); what is never settled is
reclaimed when its time is over (the client left, or the connection to the replica failed). Load guesses, idleness and
preemption read this one ledger.

Pure. The time to live is the same for all reservations, so the order of insertion is the order of expiry.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

# Requests whose replica may still speak of them, because their bodies were slow.
_LAPSED_COUNT = 4096


class Reservation(NamedTuple):
    """A place at a replica that a pick has promised; `expires_at` is in monotonic seconds.

    A NamedTuple because each pick makes one.
    """

    request_id: str
    replica_id: str
    expires_at: float


@dataclass(frozen=True, slots=True)
class LedgerStatistics:
    """How many reservations wait for their start, and how many requests run."""

    reserved_count: int
    running_count: int


class Ledger:
    """Reservations and running requests.

    Invariants: a request id holds at most one reservation; counts per replica are the sums of the entries and never
    negative; after `expire(now)` no reservation with `expires_at <= now` is left.
    """

    def __init__(self, ttl_seconds: float) -> None:
        self._ttl_seconds = ttl_seconds
        self._reservations: OrderedDict[str, Reservation] = OrderedDict()
        self._reserved: dict[str, int] = {}
        self._running: dict[str, set[str]] = {}
        self._lapsed: OrderedDict[str, None] = OrderedDict()

    def reserve(self, request_id: str, replica_id: str, now: float) -> str | None:
        """Reserves a place. Returns the replica that loses an older reservation of the same request, else None.

        The same id comes twice where Envoy moved a request to this proxy from one that died, and where a client chooses
        its own ids; one place for both is near enough in either case.
        """
        older = self._reservations.pop(request_id, None)
        if older is not None:
            self._lower(older.replica_id)
        self._reservations[request_id] = Reservation(request_id, replica_id, now + self._ttl_seconds)
        self._reserved[replica_id] = self._reserved.get(replica_id, 0) + 1
        return older.replica_id if older is not None else None

    def started(self, request_id: str, replica_id: str) -> str | None:
        """A request reached a replica, perhaps not the reserved one (Envoy retried). Returns whose place is freed."""
        self._running.setdefault(replica_id, set()).add(request_id)
        return self._settle(request_id)

    def finished(self, request_id: str, replica_id: str) -> str | None:
        """A request left a replica. Returns whose reserved place is freed, where its start was never told."""
        running = self._running.get(replica_id)
        if running is not None and request_id in running:
            running.discard(request_id)
            if not running:
                del self._running[replica_id]
            return None
        return self._settle(request_id)

    def expire(self, now: float) -> list[Reservation]:
        """Reclaims reservations whose time is over."""
        expired: list[Reservation] = []
        while self._reservations:
            reservation = next(iter(self._reservations.values()))
            if reservation.expires_at > now:
                break
            self._lapse(reservation)
            expired.append(reservation)
        return expired

    def withdraw(self, request_id: str) -> Reservation | None:
        """Reclaims the reservation of a request that reached no replica; None where there is none (any more or yet)."""
        reservation = self._reservations.get(request_id)
        if reservation is not None:
            self._lapse(reservation)
        else:
            self._note_lapsed(request_id)
        return reservation

    def _lapse(self, reservation: Reservation) -> None:
        del self._reservations[reservation.request_id]
        self._lower(reservation.replica_id)
        self._note_lapsed(reservation.request_id)

    def _note_lapsed(self, request_id: str) -> None:
        self._lapsed[request_id] = None
        if len(self._lapsed) > _LAPSED_COUNT:
            self._lapsed.popitem(last=False)

    def has_lapsed(self, request_id: str) -> bool:
        """Whether a place of a request was reclaimed a while ago, or it was said to have reached nobody."""
        return request_id in self._lapsed

    def forget_running(self, replica_id: str) -> set[str]:
        """Drops what is believed to run at a replica: it is gone, or its worker's hello is the truth. Returns what."""
        return self._running.pop(replica_id, set())

    def forget_replica(self, replica_id: str) -> set[str]:
        """Drops everything about a replica that is gone; returns what ran there."""
        lost = self.forget_running(replica_id)
        if self._reserved.pop(replica_id, 0):
            for request_id in [k for k, r in self._reservations.items() if r.replica_id == replica_id]:
                del self._reservations[request_id]
        return lost

    def is_ours(self, request_id: str) -> bool:
        """Whether a request that is heard of now was picked here: its place waits for it, or lapsed a while ago."""
        return request_id in self._reservations or request_id in self._lapsed

    def reserved_count(self, replica_id: str) -> int:
        """Reservations at a replica that have not started."""
        return self._reserved.get(replica_id, 0)

    def running_count(self, replica_id: str) -> int:
        """Requests that started at a replica and have not finished, as told."""
        return len(self._running.get(replica_id, ()))

    def is_running(self, request_id: str, replica_id: str) -> bool:
        """Whether a request started at a replica and has not finished, as told."""
        return request_id in self._running.get(replica_id, ())

    def is_idle(self, replica_id: str) -> bool:
        """Whether nothing runs at a replica and nothing is on its way to it."""
        return replica_id not in self._reserved and replica_id not in self._running

    def statistics(self) -> LedgerStatistics:
        """Sums, for metrics and tests."""
        return LedgerStatistics(len(self._reservations), sum(len(running) for running in self._running.values()))

    def _settle(self, request_id: str) -> str | None:
        reservation = self._reservations.pop(request_id, None)
        if reservation is None:
            return None
        self._lower(reservation.replica_id)
        return reservation.replica_id

    def _lower(self, replica_id: str) -> None:
        count = self._reserved[replica_id] - 1
        if count:
            self._reserved[replica_id] = count
        else:
            del self._reserved[replica_id]
