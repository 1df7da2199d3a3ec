"""Who may read next, over all transfers of a process: a number of slots, a cap on bandwidth, and an order.

A request's start beats an ingest, which beats a prefetch: while a transfer reads, no chunk of a less urgent one is
begun, whether or not slots are free, for what they share is a network, of which each connection takes its part. A
prefetch may therefore wait for as long as starts go on, which is what it is for. A transfer that only waits, for a
source that asked for patience say, holds nobody back. Transfers of one priority get the same share of bytes.

Room is given for a whole chunk before it is asked for, not while its bytes come in: a source that was slowed down by
its reader looks like one that stalls, and times out. So the cap holds over some chunks, not within one.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum

_POLL_SECONDS = 0.2
"""How late a waiter may notice that it was cancelled."""

_LINGER_SECONDS = 0.5
"""So long after its last chunk a transfer still counts as one that reads: between two chunks it is not waiting for
anything yet, and a less urgent one would take each of these moments.
"""


class Priority(IntEnum):
    """What a transfer is for; the lower the sooner."""

    START = 0
    INGEST = 1
    PREFETCH = 2


@dataclass(slots=True, eq=False)
class Flow:
    """One transfer's share. `served_bytes` is what it got, on the scale of those of the same priority."""

    priority: Priority
    served_bytes: int = 0
    ticket_count: int = 0
    read_until: float = -math.inf
    """When its last chunk ended."""
    urgency: Callable[[], Priority] | None = None
    """What its priority is now, where it may change: somebody comes to wait for what was fetched ahead."""

    def is_reading(self, now: float) -> bool:
        """Whether it reads, wants to, or did a moment ago."""
        return self.ticket_count > 0 or now < self.read_until + _LINGER_SECONDS


@dataclass(slots=True, eq=False)
class Ticket:
    """A wish to read a chunk."""

    flow: Flow
    count: int
    number: int
    is_granted: bool = False


class GatePolicy:
    """Decides who is next. Pure; not thread-safe."""

    def __init__(self, *, slot_count: int, bytes_per_second: int = 0) -> None:
        """`bytes_per_second` 0: no cap."""
        self._slot_count = slot_count
        self._bytes_per_second = bytes_per_second
        self._flows: list[Flow] = []
        self._waiting: list[Ticket] = []
        self._granted_count = 0
        self._number = 0
        # A debt: each chunk is paid for after it was granted, so that one larger than any burst passes too. Less than
        # a byte is none: floats don't add up.
        self._debt_bytes = 0.0
        self._paid_at: float | None = None

    def open(self, priority: Priority | Callable[[], Priority]) -> Flow:
        """Adds a transfer; it begins where its peers are, so that it neither waits for them nor makes them wait.

        A priority that is a function is asked before chunks are let in, and should be quick.
        """
        urgency = None if isinstance(priority, Priority) else priority
        flow = Flow(priority if isinstance(priority, Priority) else priority(), urgency=urgency)
        flow.served_bytes = self._place(flow)
        self._flows.append(flow)
        return flow

    def _place(self, flow: Flow) -> int:
        """Where the peers of a transfer are."""
        return min((f.served_bytes for f in self._flows if f is not flow and f.priority == flow.priority), default=0)

    def _follow(self, flow: Flow) -> None:
        if flow.urgency is not None and (priority := flow.urgency()) is not flow.priority:
            flow.priority = priority
            flow.served_bytes = self._place(flow)

    def close(self, flow: Flow) -> None:
        """The flow's transfer has ended. Raises ValueError where it was never opened."""
        self._flows.remove(flow)

    def ask(self, flow: Flow, count: int) -> Ticket:
        """Wishes to read so many bytes."""
        self._number += 1
        ticket = Ticket(flow, count, self._number)
        flow.ticket_count += 1
        self._waiting.append(ticket)
        return ticket

    def end(self, ticket: Ticket, now: float) -> None:
        """The chunk was read, or is not wanted any more."""
        ticket.flow.ticket_count -= 1
        if ticket.is_granted:
            self._granted_count -= 1
            ticket.flow.read_until = now
        else:
            self._waiting.remove(ticket)

    def grant(self, now: float) -> list[Ticket]:
        """Lets in as many as may; returns them."""
        self._pay(now)
        for flow in self._flows:
            self._follow(flow)
        granted: list[Ticket] = []
        most_urgent = min((flow.priority for flow in self._flows if flow.is_reading(now)), default=Priority.PREFETCH)
        while self._waiting and self._granted_count < self._slot_count and self._debt_bytes < 1:
            ticket = min(self._waiting, key=lambda t: (t.flow.priority, t.flow.served_bytes, t.number))
            if ticket.flow.priority > most_urgent:
                break
            self._waiting.remove(ticket)
            ticket.is_granted = True
            ticket.flow.served_bytes += ticket.count
            self._granted_count += 1
            if self._bytes_per_second:
                self._debt_bytes += ticket.count
            granted.append(ticket)
        return granted

    def wait_seconds(self) -> float | None:
        """When the cap lets the next one in; None where it is not the cap that is waited for."""
        return self._debt_bytes / self._bytes_per_second if self._debt_bytes >= 1 else None

    def _pay(self, now: float) -> None:
        if self._bytes_per_second and self._paid_at is not None:
            self._debt_bytes = max(0.0, self._debt_bytes - (now - self._paid_at) * self._bytes_per_second)
        self._paid_at = now


class DownloadGate:
    """The policy for threads; one for all transfers of a process."""

    def __init__(self, *, slot_count: int = 16, bytes_per_second: int = 0) -> None:
        """`slot_count`: requests at a time; `bytes_per_second` 0: no cap."""
        self._policy = GatePolicy(slot_count=slot_count, bytes_per_second=bytes_per_second)
        self._changed = threading.Condition()

    @contextmanager
    def flow(self, priority: Priority | Callable[[], Priority]) -> Iterator[Flow]:
        """One transfer's share."""
        with self._changed:
            flow = self._policy.open(priority)
        try:
            yield flow
        finally:
            with self._changed:
                self._policy.close(flow)

    @contextmanager
    def admit(self, flow: Flow, count: int, check: Callable[[], None]) -> Iterator[None]:
        """Waits for room for one chunk; `check` is called meanwhile, and ends the wait by raising."""
        with self._changed:
            ticket = self._policy.ask(flow, count)
        try:
            self._wait(ticket, check)
            yield
        finally:
            with self._changed:
                self._policy.end(ticket, time.monotonic())
                self._changed.notify_all()

    def _wait(self, ticket: Ticket, check: Callable[[], None]) -> None:
        with self._changed:
            while not ticket.is_granted:
                if len(self._policy.grant(time.monotonic())) > 0:
                    self._changed.notify_all()
                if not ticket.is_granted:
                    check()
                    self._changed.wait(min(_POLL_SECONDS, self._policy.wait_seconds() or _POLL_SECONDS))
