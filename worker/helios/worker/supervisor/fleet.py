"""One state, many sessions: every proxy hears of every change, and none of them can hold up the worker."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from helios.worker.replica.kv_losses import LossLog
from helios.worker.supervisor.outbox import DEFAULT_CAPACITY, Outbox, ReplicaEvent, StagedEvent
from helios.worker.supervisor.records import DeviceMeasure, LoadDelta, ReplicaView, StagedView, WorkerView


class FleetFeed:
    """Gives each session a snapshot and an outbox with everything that changed since that snapshot.

    Invariant: snapshot and outbox are made in one step, so that no change falls between them. Sequence numbers grow
    by one with each event of this process, whoever listens. What KV caches lost last is in each outbox from the
    beginning: a proxy that was away for a moment need not forget what it knew.
    """

    def __init__(self, snapshot: Callable[[], WorkerView], outbox_capacity: int = DEFAULT_CAPACITY) -> None:
        self._snapshot = snapshot
        self._capacity = outbox_capacity
        self._outboxes: list[Outbox] = []
        self._sequence = 0
        self._losses: dict[str, LossLog] = {}

    @contextmanager
    def subscribe(self, wake: Callable[[Outbox], None]) -> Iterator[tuple[WorkerView, Outbox]]:
        """Lends an outbox for the block; ``wake`` is called with it whenever something was put in."""
        outbox = Outbox(wake, self._capacity)
        whole = self._snapshot()
        for replica in whole.replicas:
            if (log := self._losses.get(replica.replica_id)) is not None:
                outbox.put_delta(LoadDelta(replica.replica_id, replica.load, losses=log.since(0)))
        self._outboxes.append(outbox)
        try:
            yield whole, outbox
        finally:
            self._outboxes.remove(outbox)

    def publish(self, view: ReplicaView) -> None:
        """Tells every session of a changed replica."""
        self._sequence += 1
        if view.state.is_ended:
            self._losses.pop(view.replica_id, None)
        event = ReplicaEvent(self._sequence, view)
        for outbox in self._outboxes:
            outbox.put_event(event)

    def publish_staged(self, view: StagedView) -> None:
        """Tells every session of a changed staged revision."""
        self._sequence += 1
        event = StagedEvent(self._sequence, view)
        for outbox in self._outboxes:
            outbox.put_staged(event)

    def report_device(self, measure: DeviceMeasure, booked_bytes: int) -> None:
        """Tells every session what was measured of a device."""
        for outbox in self._outboxes:
            outbox.put_device(measure, booked_bytes)

    def report(self, delta: LoadDelta) -> None:
        """Tells every session of a changed load, which the snapshot has by now."""
        if delta.losses is not None:
            self._losses.setdefault(delta.replica_id, LossLog()).take(delta.losses)
        for outbox in self._outboxes:
            outbox.put_delta(delta)
