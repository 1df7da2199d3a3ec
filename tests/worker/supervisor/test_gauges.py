"""What is measured is told where it changed, and loads of devices fold into the next report."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime

from helios.mesh.tasks import task_scope
from helios.worker.supervisor.gauges import keep_measuring
from helios.worker.supervisor.outbox import LoadReport, Outbox
from helios.worker.supervisor.records import (
    DeviceMeasure,
    Load,
    LoadDelta,
    Order,
    ProcessIdentity,
    ReplicaState,
    ReplicaView,
    WorkerView,
)

ORDER = Order("r", "m", "sha256:1", "vllm", 1000, 100, 0, datetime(2026, 1, 1, tzinfo=UTC))


class FakeInventory:
    """Measures what it is told."""

    def __init__(self) -> None:
        self.used_bytes = 1
        self.held_bytes: int | None = 500
        self.round_count = 0

    def measure(self) -> tuple[DeviceMeasure, ...]:
        self.round_count += 1
        return (DeviceMeasure("cpu:0", used_bytes=self.used_bytes),)

    def process_bytes(self, pids: frozenset[int]) -> int | None:
        return self.held_bytes


class FakeSupervisor:
    """One replica, and what was told of it."""

    def __init__(self) -> None:
        self.replica = ReplicaView(ORDER, ReplicaState.READY, process=ProcessIdentity(1 << 22, 1))
        self.devices: list[DeviceMeasure] = []
        self.memory: list[int] = []

    def view(self) -> WorkerView:
        return WorkerView("w", "1", "n", "v", (), (), 8, (self.replica,))

    def note_measure(self, measure: DeviceMeasure) -> None:
        self.devices.append(measure)

    def note_memory(self, replica_id: str, measured_bytes: int) -> None:
        self.memory.append(measured_bytes)
        asleep = self.replica.state is ReplicaState.ASLEEP
        change = {"sleeping_bytes" if asleep else "measured_bytes": measured_bytes}
        self.replica = replace(self.replica, **change)  # type: ignore[arg-type]


async def rounds(inventory: FakeInventory, count: int) -> None:
    until = inventory.round_count + count
    async with asyncio.timeout(10):
        while inventory.round_count < until:
            await asyncio.sleep(0.001)


async def test_only_what_changed_is_told() -> None:
    inventory, supervisor = FakeInventory(), FakeSupervisor()
    async with task_scope() as group:
        group.create_task(keep_measuring(inventory, supervisor, interval_seconds=0.001))
        await rounds(inventory, 62)
        assert supervisor.devices == [DeviceMeasure("cpu:0", used_bytes=1)]
        assert supervisor.memory == [500]
        # Below a hundredth is noise.
        inventory.held_bytes, inventory.used_bytes = 504, 2
        await rounds(inventory, 62)
        assert len(supervisor.devices) == 2
        assert supervisor.memory == [500]
        supervisor.replica = replace(supervisor.replica, state=ReplicaState.ASLEEP, sleeping_bytes=1000)
        inventory.held_bytes = 60
        await rounds(inventory, 62)
        assert supervisor.memory == [500, 60]


async def test_what_was_measured_of_a_replica_that_fell_asleep_meanwhile_is_not_told() -> None:
    supervisor = FakeSupervisor()

    class Slow(FakeInventory):
        def process_bytes(self, pids: frozenset[int]) -> int | None:
            if supervisor.replica.state is ReplicaState.READY:
                supervisor.replica = replace(supervisor.replica, state=ReplicaState.ASLEEP)
                return 500
            return 60

    inventory = Slow()
    async with task_scope() as group:
        group.create_task(keep_measuring(inventory, supervisor, interval_seconds=0.001))
        await rounds(inventory, 62)
        assert supervisor.memory == [], "it still falls asleep"
        supervisor.replica = replace(supervisor.replica, sleeping_bytes=1000)
        await rounds(inventory, 62)
        assert supervisor.memory == [60]


def test_measures_of_devices_go_with_the_next_report_the_newest_of_each() -> None:
    woken: list[Outbox] = []
    outbox = Outbox(woken.append)
    for used in (1, 2):
        outbox.put_device(DeviceMeasure("cuda:0", used_bytes=used), booked_bytes=7)
    assert outbox.has_load
    assert outbox.take(is_load_due=False) == []
    newest = (DeviceMeasure("cuda:0", used_bytes=2), 7)
    assert outbox.take(is_load_due=True) == [LoadReport((), (newest,))]
    assert outbox.take(is_load_due=True) == []
    outbox.put_device(*newest)
    outbox.put_delta(LoadDelta("r", Load()))
    assert outbox.take(is_load_due=True) == [LoadReport((LoadDelta("r", Load()),), (newest,))]
