"""The last so many requests, bounded in count and in bytes. Pure.

A request that is sent at once is kept as the tuple that the picker made of it, because that is on the path of every
request; whoever asks for its record turns it into one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeAlias

from helios.proxy.explain.record import RECORD_BYTES, Record

if TYPE_CHECKING:
    from helios.proxy.routing.pick import Pick

# The name asked for, the pick, who could not be picked, Envoy's `request.time`, arrived at, answered at (monotonic).
Picked: TypeAlias = "tuple[str, Pick, tuple[tuple[str, str], ...], str, float, float]"


class Ring:
    """Records by request id, oldest first.

    Invariants: never more than `limit_count` records; never more than `limit_bytes` by the records' own account, except
    that the newest is always kept. An id that comes again replaces its record.

    Attributes:
        wall_offset: wall clock less monotonic clock; records are made with it.
    """

    def __init__(self, limit_count: int, limit_bytes: int, *, wall_offset: float = 0.0) -> None:
        self._limit_count = limit_count
        self._limit_bytes = limit_bytes
        self._records: OrderedDict[str, Record | Picked] = OrderedDict()
        self._extra_bytes = 0
        self._room_count = 0
        self.wall_offset = wall_offset
        self._add_extra(0)

    @property
    def size_bytes(self) -> int:
        """Bytes of all records, by their own account."""
        return len(self._records) * RECORD_BYTES + self._extra_bytes

    def note(self, request_id: str, picked: Picked) -> None:
        """Adds a request that was sent at once."""
        records = self._records
        if request_id in records:
            self._drop(request_id)
        records[request_id] = picked
        if len(records) > self._room_count:
            self._evict()

    def put(self, record: Record) -> None:
        """Adds a record."""
        self._drop(record.request_id)
        self._records[record.request_id] = record
        self._add_extra(record.size_bytes - RECORD_BYTES)
        self._evict()

    def grow(self, record: Record, more_bytes: int) -> None:
        """Accounts for what was added to a record; harmless where it is not kept any more."""
        if self._records.get(record.request_id) is record:
            record.size_bytes += more_bytes
            self._add_extra(more_bytes)
            self._evict()

    def get(self, request_id: str) -> Record | None:
        """The record of a request; None where it is not kept."""
        kept = self._records.get(request_id)
        return self._made(request_id, kept) if kept is not None else None

    def __contains__(self, request_id: str) -> bool:
        """Whether a request is kept."""
        return request_id in self._records

    def newest(self) -> Iterator[Record]:
        """All records, the newest first."""
        for request_id, kept in reversed(list(self._records.items())):
            yield self._made(request_id, kept)

    def __len__(self) -> int:
        """How many records are kept."""
        return len(self._records)

    def _made(self, request_id: str, kept: Record | Picked) -> Record:
        if isinstance(kept, Record):
            return kept
        name, pick, excluded, began, arrived_at, answered_at = kept
        record = Record(request_id, name, began, arrived_at, self.wall_offset)
        record.model, record.revision, record.pick, record.excluded = pick.model, pick.revision, pick, excluded
        record.answered_at = answered_at
        self._records[request_id] = record
        return record

    def _drop(self, request_id: str) -> None:
        older = self._records.pop(request_id, None)
        if isinstance(older, Record):
            self._add_extra(RECORD_BYTES - older.size_bytes)

    def _add_extra(self, more_bytes: int) -> None:
        """Accounts for what records hold beyond RECORD_BYTES, which leaves room for that many records."""
        self._extra_bytes += more_bytes
        self._room_count = max(1, min(self._limit_count, (self._limit_bytes - self._extra_bytes) // RECORD_BYTES))

    def _evict(self) -> None:
        while len(self._records) > self._room_count:
            self._drop(next(iter(self._records)))
