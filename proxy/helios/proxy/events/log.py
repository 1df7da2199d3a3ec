"""The last so many events, by number, for any number of readers of any speed. Pure.

A reader has a cursor and asks for what came after it. Nothing is kept for a reader: one that is slower than events come
finds that some are gone, and is told.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import islice

from helios.mesh.errors import InvalidRequest
from helios.proxy.events.record import Event, EventKind

# Some hours of a busy fleet; half a megabyte.
_LIMIT_COUNT = 4_096
# What one answer holds: a reader that catches up lets others have their turn in between.
_PAGE_COUNT = 256
_MOST_DIGITS = 19


@dataclass(frozen=True, slots=True)
class Numbered:
    """An event with its number and time (monotonic seconds)."""

    number: int
    at: float
    event: Event


@dataclass(frozen=True, slots=True)
class Page:
    """What came after a cursor.

    Attributes:
        events: the next events, oldest first.
        number: where the next page begins: after this number.
        is_missed: events before those are not known any more.
    """

    events: tuple[Numbered, ...]
    number: int
    is_missed: bool


class EventLog:
    """Numbers events from 1 on. Its `log_id` tells it from the logs of other processes, and of earlier runs."""

    def __init__(self, log_id: str, *, limit_count: int = _LIMIT_COUNT) -> None:
        self.log_id = log_id
        self.last_number = 0
        self._events: deque[Numbered] = deque(maxlen=limit_count)
        # A start that waits says so each time that it looks again; that is one event until something else happens.
        self._delayed: dict[str, Event] = {}

    def add(self, event: Event, at: float) -> bool:
        """Appends an event; False where it only repeats what is known."""
        if event.kind is EventKind.START_DELAYED:
            if self._delayed.get(event.model) == event:
                return False
            self._delayed[event.model] = event
        elif event.kind in (EventKind.START_BEGUN, EventKind.START_FAILED, EventKind.START_DONE):
            self._delayed.pop(event.model, None)
        self.last_number += 1
        self._events.append(Numbered(self.last_number, at, event))
        return True

    def cursor(self, number: int) -> str:
        """What a reader gives back to go on after this number."""
        return f"{self.log_id}:{number}"

    def position(self, cursor: str | None) -> tuple[int, bool]:
        """Returns the number after which a reader goes on, and whether it missed events.

        None is from now on; empty is from the oldest that is known; a cursor of another log begins anew.

        Raises:
            InvalidRequest: INVALID_CURSOR: it is none, or of an event that is yet to come.
        """
        if cursor is None:
            return self.last_number, False
        if not cursor:
            return self._oldest - 1, False
        log_id, _, number = cursor.rpartition(":")
        # Python reads no number of thousands of digits.
        if not log_id or not number.isdecimal() or len(number) > _MOST_DIGITS:
            raise _no_cursor(cursor)
        if log_id != self.log_id:
            return self._oldest - 1, True
        if int(number) > self.last_number:
            raise _no_cursor(cursor)
        return int(number), False

    def after(self, number: int, model: str = "") -> Page:
        """Returns the next page of events after a number; of one model where it is named."""
        oldest = self._oldest
        is_missed = number < oldest - 1
        start = 0 if is_missed else number - oldest + 1
        read = list(islice(self._events, start, start + _PAGE_COUNT))
        found = tuple(each for each in read if not model or each.event.model == model)
        return Page(found, read[-1].number if read else max(number, oldest - 1), is_missed)

    @property
    def _oldest(self) -> int:
        return self._events[0].number if self._events else self.last_number + 1


def _no_cursor(cursor: str) -> InvalidRequest:
    return InvalidRequest(
        "after takes the cursor of an event, or nothing for all that is known",
        reason="INVALID_CURSOR",
        metadata={"param": "after", "after": cursor[:80]},
    )
