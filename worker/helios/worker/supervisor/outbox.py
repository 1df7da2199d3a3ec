"""What waits to be sent to one proxy: events and acks in order, loads folded together.

Pure: the session is woken by a callback, which is given the outbox, and decides when to take. Loads change with every
token and are worth sending a few times a second; the end of a request is worth sending at once, because the proxy's
ledger of reservations waits for it.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from helios.worker.replica.kv_losses import joined
from helios.worker.supervisor.commands import Ack
from helios.worker.supervisor.records import DeviceMeasure, LoadDelta, ReplicaView, StagedView

# A slow proxy costs at most some hundred KiB; a proxy that reads at all never gets near it.
DEFAULT_CAPACITY: Final = 4096


@dataclass(frozen=True, slots=True)
class ReplicaEvent:
    """A replica changed."""

    sequence: int
    view: ReplicaView


@dataclass(frozen=True, slots=True)
class StagedEvent:
    """A staged revision changed."""

    sequence: int
    view: StagedView


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Loads changed, one delta a replica; and devices were measured, each with what is booked on it."""

    deltas: tuple[LoadDelta, ...]
    devices: tuple[tuple[DeviceMeasure, int], ...] = ()


Outgoing = ReplicaEvent | StagedEvent | Ack | LoadReport


class Outbox:
    """Bounded; never blocks the writer.

    Invariants: events and acks leave in the order in which they came; each started and finished request leaves
    exactly once; a delta of a replica leaves before the event that ends the replica. Where more than ``capacity``
    entries wait, the box empties itself and ``is_overflowed`` stays set: what it held is told by the next session's
    hello.
    """

    def __init__(self, wake: "Callable[[Outbox], None]", capacity: int = DEFAULT_CAPACITY) -> None:
        self._wake = wake
        self._capacity = capacity
        self._queue: deque[Outgoing] = deque()
        self._deltas: dict[str, LoadDelta] = {}
        self._devices: dict[str, tuple[DeviceMeasure, int]] = {}
        self._request_count = 0
        self._is_urgent = False
        self.is_overflowed = False

    def __len__(self) -> int:
        """Counts what waits: messages, and requests inside the deltas."""
        return len(self._queue) + len(self._deltas) + self._request_count

    def put_event(self, event: ReplicaEvent) -> None:
        """Takes a change of a replica."""
        last = self._deltas.pop(event.view.replica_id, None) if event.view.state.is_ended else None
        if last is not None:
            self._request_count -= len(last.started) + len(last.finished)
            self._queue.append(LoadReport((last,)))
        self._put(event)

    def put_staged(self, event: StagedEvent) -> None:
        """Takes a change of a staged revision."""
        self._put(event)

    def put_device(self, measure: DeviceMeasure, booked_bytes: int) -> None:
        """Takes what was measured of a device; an older measure of it that still waits is worth nothing."""
        if not self.is_overflowed:
            self._devices[measure.device_id] = (measure, booked_bytes)
            self._wake(self)

    def put_ack(self, ack: Ack) -> None:
        """Takes an answer."""
        self._put(ack)

    def put_delta(self, delta: LoadDelta) -> None:
        """Folds a delta into the one that waits for the same replica."""
        waiting = self._deltas.get(delta.replica_id)
        if waiting is not None:
            delta = replace(
                delta,
                started=(*waiting.started, *delta.started),
                finished=(*waiting.finished, *delta.finished),
                arrivals=(*waiting.arrivals, *delta.arrivals),
                losses=joined(waiting.losses, delta.losses),
            )
            self._request_count -= len(waiting.started) + len(waiting.finished)
        self._deltas[delta.replica_id] = delta
        self._request_count += len(delta.started) + len(delta.finished)
        self._is_urgent = self._is_urgent or bool(delta.finished)
        self._check()
        self._wake(self)

    def take(self, *, is_load_due: bool) -> list[Outgoing]:
        """Empties the box and returns what is to be sent now; loads only when due, or when a request ended."""
        messages = list(self._queue)
        self._queue.clear()
        if self.has_load and (is_load_due or self._is_urgent):
            messages.append(LoadReport(tuple(self._deltas.values()), tuple(self._devices.values())))
            self._drop_deltas()
        return messages

    @property
    def has_urgent(self) -> bool:
        """Whether something waits that is to be sent at once."""
        return bool(self._queue) or (self._is_urgent and bool(self._deltas))

    @property
    def has_load(self) -> bool:
        """Whether loads wait."""
        return bool(self._deltas) or bool(self._devices)

    def _put(self, message: Outgoing) -> None:
        if self.is_overflowed:
            return
        self._queue.append(message)
        self._check()
        self._wake(self)

    def _check(self) -> None:
        if self.is_overflowed or len(self) > self._capacity:
            self.is_overflowed = True
            self._queue.clear()
            self._drop_deltas()

    def _drop_deltas(self) -> None:
        self._deltas.clear()
        self._devices.clear()
        self._request_count = 0
        self._is_urgent = False
