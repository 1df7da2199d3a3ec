"""Between the contract's messages of devices, memory and staged revisions and the supervisor's records."""

from collections.abc import Iterable

from helios.api.fleet.v1 import fleet_service_pb2 as fleet
from helios.api.fleet.v1 import types_pb2 as types
from helios.worker.supervisor.records import (
    DeviceMeasure,
    DeviceUse,
    HostUse,
    MemoryItem,
    MemoryKind,
    StagedView,
)


def items_to_proto(items: Iterable[MemoryItem]) -> list[types.MemoryItem]:
    """Returns what memory is made of."""
    return [
        types.MemoryItem(kind=types.MemoryKind.Value(f"MEMORY_KIND_{item.kind.value}"), size_bytes=item.size_bytes)
        for item in items
    ]


def items_from_proto(items: Iterable[types.MemoryItem]) -> tuple[MemoryItem, ...]:
    """Returns what memory is made of; a kind that this version does not know is OVERHEAD."""
    return tuple(MemoryItem(_kind(item.kind), item.size_bytes) for item in items)


def device_to_proto(use: DeviceUse) -> fleet.Device:
    """Returns the message of a device."""
    facts = use.device.facts
    message = fleet.Device(
        device_id=use.device.device_id,
        kind=fleet.DeviceKind.Value(f"DEVICE_KIND_{use.device.kind.value}"),
        memory_bytes=use.device.memory_bytes,
        booked_bytes=use.booked_bytes,
        name=facts.name,
        uuid=facts.uuid,
        parent_device_id=facts.parent_device_id,
        mig_profile=facts.mig_profile,
        pci_bus_id=facts.pci_bus_id,
        compute_capability=facts.compute_capability,
        numa_node=facts.numa_node,
        links=[
            fleet.DeviceLink(
                device_id=link.device_id,
                kind=fleet.DeviceLinkKind.Value(f"DEVICE_LINK_KIND_{link.kind.value}"),
                link_count=link.link_count,
            )
            for link in facts.links
        ],
    )
    if use.measure is not None:
        message.health = fleet.DeviceHealth.Value(f"DEVICE_HEALTH_{use.measure.health.value}")
        message.health_message = use.measure.health_message
        message.telemetry.CopyFrom(measure_to_proto(use.measure, use.booked_bytes))
    return message


def measure_to_proto(measure: DeviceMeasure, booked_bytes: int) -> fleet.DeviceTelemetry:
    """Returns the message of a measure."""
    return fleet.DeviceTelemetry(
        device_id=measure.device_id,
        used_bytes=measure.used_bytes,
        total_bytes=measure.total_bytes,
        utilization_ratio=measure.utilization_ratio,
        temperature_celsius=measure.temperature_celsius,
        corrected_error_count=measure.corrected_error_count,
        uncorrected_error_count=measure.uncorrected_error_count,
        health=fleet.DeviceHealth.Value(f"DEVICE_HEALTH_{measure.health.value}"),
        health_message=measure.health_message,
        booked_bytes=booked_bytes,
    )


def staged_to_proto(view: StagedView) -> fleet.StagedRevision:
    """Returns the message of a staged revision."""
    message = fleet.StagedRevision(
        revision=view.revision,
        model=view.model,
        state=fleet.StagedState.Value(f"STAGED_STATE_{view.state.value}"),
        memory_bytes=view.memory_bytes,
        resident_bytes=view.resident_bytes,
        locked_bytes=view.locked_bytes,
    )
    if view.failure is not None:
        message.failure.CopyFrom(types.ReplicaFailure(reason=view.failure.reason, message=view.failure.message))
    return message


def host_to_proto(host: HostUse) -> fleet.HostMemory:
    """Returns the message of the memory that staged revisions share."""
    return fleet.HostMemory(memory_bytes=host.memory_bytes, booked_bytes=host.booked_bytes)


def _kind(kind: types.MemoryKind.ValueType) -> MemoryKind:
    known = {types.MemoryKind.Value(f"MEMORY_KIND_{own.value}"): own for own in MemoryKind}
    return known.get(kind, MemoryKind.OVERHEAD)
