"""Between the fleet's wire types and the proxy's own: plain functions, both ways."""

from dataclasses import replace
from datetime import UTC, datetime
from enum import Enum
from typing import TypeVar

from google.protobuf import json_format
from google.protobuf.timestamp_pb2 import Timestamp

from helios.api.engine.v1 import engine_settings_pb2
from helios.api.fleet.v1 import fleet_service_pb2 as pb
from helios.api.fleet.v1 import types_pb2
from helios.mesh.durations import seconds_to_proto
from helios.mesh.gangs import Way
from helios.mesh.transfer.progress import TransferProgress
from helios.proxy.admission.quotas import Usage
from helios.proxy.explain.record import Finished
from helios.proxy.fleet.commands import (
    Command,
    DrainReplica,
    EvictRevision,
    Fence,
    SetAdapters,
    SleepReplica,
    StageRevision,
    StartReplica,
    StopReplica,
    UnstageRevision,
    WakeReplica,
)
from helios.proxy.fleet.state import (
    Adapter,
    AdapterState,
    Device,
    DeviceKind,
    Form,
    HeldAdapter,
    Load,
    Replica,
    ReplicaState,
    Staged,
    StagedState,
    WorkerHello,
)
from helios.proxy.routing.corrections import KvNews
from helios.proxy.traffic import LoadDelta

E = TypeVar("E", bound=Enum)
D = TypeVar("D")

_WAYS = {
    pb.DEVICE_LINK_KIND_NVLINK: Way.NVLINK,
    pb.DEVICE_LINK_KIND_PCIE_SWITCH: Way.PCIE_SWITCH,
    pb.DEVICE_LINK_KIND_PCIE_HOST: Way.PCIE_HOST,
    pb.DEVICE_LINK_KIND_SYSTEM: Way.SYSTEM,
}


def hello_from_proto(message: pb.Hello) -> WorkerHello:
    """A worker's introduction."""
    return WorkerHello(
        worker_id=message.worker_id,
        incarnation=message.incarnation,
        node=message.node,
        zone=message.zone,
        devices=tuple(device_from_proto(device) for device in message.devices),
        engines=tuple(message.engines),
        slot_count=message.slot_count,
        replicas=tuple(replica_from_proto(replica, message.worker_id) for replica in message.replicas),
        version=message.version,
        host_memory_bytes=message.host_memory.memory_bytes,
        staged=tuple(staged_from_proto(staged, message.worker_id) for staged in message.staged),
    )


def device_from_proto(message: pb.Device) -> Device:
    """A device; a kind that this software does not know is UNKNOWN."""
    measured = measure_from_proto(message.telemetry)
    facts = pb.Device()
    facts.CopyFrom(message)
    facts.ClearField("telemetry")
    return replace(
        measured,
        device_id=message.device_id,
        kind=known(int(message.kind), DeviceKind, DeviceKind.UNKNOWN),
        memory_bytes=message.memory_bytes,
        booked_bytes=message.booked_bytes,
        is_healthy=_is_healthy(message.health),
        is_slice=bool(message.parent_device_id),
        ways=tuple((link.device_id, _WAYS.get(link.kind, Way.UNKNOWN)) for link in message.links),
        facts=facts.SerializeToString(),
    )


def measure_from_proto(message: pb.DeviceTelemetry) -> Device:
    """What was measured of a device, whose kind and memory are said elsewhere."""
    return Device(
        device_id=message.device_id,
        kind=DeviceKind.UNKNOWN,
        memory_bytes=0,
        booked_bytes=message.booked_bytes,
        is_healthy=_is_healthy(message.health),
        used_ratio=message.used_bytes / message.total_bytes if message.total_bytes else 0.0,
        busy_ratio=message.utilization_ratio,
        telemetry=message.SerializeToString(),
    )


def _is_healthy(health: pb.DeviceHealth.ValueType) -> bool:
    return health in (pb.DEVICE_HEALTH_UNSPECIFIED, pb.DEVICE_HEALTH_HEALTHY)


def staged_from_proto(message: pb.StagedRevision, worker_id: str) -> Staged:
    """A staged revision; a state that this software does not know counts as on its way."""
    return Staged(
        revision=message.revision,
        model=message.model,
        state=known(int(message.state), StagedState, StagedState.STAGING),
        worker_id=worker_id,
        memory_bytes=message.memory_bytes,
        resident_bytes=message.resident_bytes,
        locked_bytes=message.locked_bytes,
        failure_reason=message.failure.reason,
        failure_message=message.failure.message,
    )


def staged_to_proto(staged: Staged) -> pb.StagedRevision:
    """A staged revision."""
    return pb.StagedRevision(
        revision=staged.revision,
        model=staged.model,
        state=pb.StagedState.ValueType(staged.state.value),
        memory_bytes=staged.memory_bytes,
        resident_bytes=staged.resident_bytes,
        locked_bytes=staged.locked_bytes,
    )


def device_to_proto(device: Device) -> pb.Device:
    """A device, with what was measured of it last."""
    message = pb.Device.FromString(device.facts)
    message.device_id = device.device_id
    message.kind = pb.DeviceKind.ValueType(device.kind.value)
    message.memory_bytes = device.memory_bytes
    message.booked_bytes = device.booked_bytes
    if device.telemetry:
        message.telemetry.ParseFromString(device.telemetry)
        message.health = message.telemetry.health
        message.health_message = message.telemetry.health_message
    return message


def replica_from_proto(message: types_pb2.Replica, worker_id: str) -> Replica:
    """A replica; a state that this software does not know counts as PENDING, so that nothing is sent to it."""
    return Replica(
        replica_id=message.replica_id,
        model=message.model,
        revision=message.revision,
        state=known(int(message.state), ReplicaState, ReplicaState.PENDING),
        worker_id=worker_id,
        address=message.address,
        engine=message.engine,
        pid=message.pid,
        failure_reason=message.failure.reason,
        failure_message=message.failure.message,
        phases=tuple((timing.phase, timing.duration.ToNanoseconds() / 1e9) for timing in message.phases),
        memory_bytes=message.memory_bytes,
        created_at=message.created_at.ToNanoseconds() / 1e9 if message.HasField("created_at") else 0.0,
        max_context_tokens=message.max_context_tokens,
        load=load_from_proto(message.load),
        device_ids=tuple(message.device_ids),
        memory_items=tuple((_kind_name(item.kind), item.size_bytes) for item in message.memory_items),
        host_memory_items=tuple((_kind_name(item.kind), item.size_bytes) for item in message.host_memory_items),
        measured_bytes=message.measured_bytes,
        can_sleep=message.can_sleep,
        wake_count=message.wake_count,
        form=known(int(message.compilation), Form, Form.UNKNOWN),
        is_background=message.in_background,
        adapters=tuple(map(_adapter_from_proto, message.adapters)),
        fetch=_fetch_from_proto(message.fetch) if message.HasField("fetch") else None,
    )


def _fetch_from_proto(message: types_pb2.FetchProgress) -> TransferProgress:
    remaining_seconds = message.remaining.ToNanoseconds() / 1e9 if message.HasField("remaining") else None
    return TransferProgress(message.done_bytes, message.total_bytes, message.bytes_per_second, remaining_seconds)


def replica_to_proto(replica: Replica) -> types_pb2.Replica:
    """A replica."""
    message = types_pb2.Replica(
        replica_id=replica.replica_id,
        model=replica.model,
        revision=replica.revision,
        state=types_pb2.ReplicaState.ValueType(replica.state.value),
        address=replica.address,
        engine=replica.engine,
        pid=replica.pid,
        memory_bytes=replica.memory_bytes,
        max_context_tokens=replica.max_context_tokens,
        device_ids=replica.device_ids,
        memory_items=_items_to_proto(replica.memory_items),
        host_memory_items=_items_to_proto(replica.host_memory_items),
        measured_bytes=replica.measured_bytes,
        can_sleep=replica.can_sleep,
        wake_count=replica.wake_count,
        compilation=engine_settings_pb2.CompilationMode.ValueType(replica.form.value),
        in_background=replica.is_background,
        adapters=map(_adapter_to_proto, replica.adapters),
        phases=[
            types_pb2.PhaseTiming(phase=name, duration=seconds_to_proto(seconds)) for name, seconds in replica.phases
        ],
        load=types_pb2.ReplicaLoad(
            running_requests=replica.load.running_count,
            waiting_requests=replica.load.waiting_count,
            kv_usage_ratio=replica.load.kv_usage_ratio,
            generated_tokens=replica.load.generated_tokens,
        ),
    )
    if replica.failure_reason:
        message.failure.reason, message.failure.message = replica.failure_reason, replica.failure_message
    if replica.created_at:
        message.created_at.CopyFrom(timestamp(replica.created_at))
    if (fetch := replica.fetch) is not None:
        message.fetch.done_bytes, message.fetch.total_bytes = fetch.done_bytes, fetch.total_bytes
        message.fetch.bytes_per_second = fetch.bytes_per_second
        if fetch.remaining_seconds is not None:
            message.fetch.remaining.CopyFrom(seconds_to_proto(fetch.remaining_seconds))
    return message


def load_from_proto(message: types_pb2.ReplicaLoad) -> Load:
    """A load; the ratio is brought into [0, 1]."""
    return Load(
        running_count=message.running_requests,
        waiting_count=message.waiting_requests,
        kv_usage_ratio=min(1.0, max(0.0, message.kv_usage_ratio)),
        generated_tokens=message.generated_tokens,
    )


def delta_from_proto(message: types_pb2.LoadDelta) -> LoadDelta:
    """What changed at a replica."""
    return LoadDelta(
        replica_id=message.replica_id,
        load=load_from_proto(message.load),
        started=tuple(started.request_id for started in message.started),
        finished=tuple((finished.request_id, finished.status_code) for finished in message.finished),
        usage=tuple(
            Usage(ended.request_id, ended.status_code, ended.prompt_tokens, ended.completion_tokens)
            for ended in message.finished
        ),
        kv=_kv_from_proto(message.kv_cache) if message.HasField("kv_cache") else None,
    )


def _kv_from_proto(message: types_pb2.KvCacheNews) -> KvNews:
    losses = tuple(
        (loss.request_id, min(1.0, loss.kept_tokens / loss.prompt_tokens) if loss.prompt_tokens else 0.0)
        for loss in message.losses
    )
    return KvNews(message.sequence, message.after, losses)


def command_to_proto(command: Command) -> pb.SessionResponse:
    """A command, as the message that carries it."""
    message = pb.Command(command_id=command.command_id, epoch=command.epoch)
    match command.order:
        case StartReplica() as order:
            message.start.CopyFrom(
                pb.StartReplica(
                    traceparent=order.traceparent,
                    requested_at=timestamp(order.requested_at) if order.requested_at else None,
                    replica_id=order.replica_id,
                    model=order.model,
                    revision=order.revision,
                    engine=order.engine,
                    memory_bytes=order.memory_bytes,
                    kv_cache_bytes=order.kv_cache_bytes,
                    max_context_tokens=order.max_context_tokens,
                    engine_settings=_settings_to_proto(order.engine_settings),
                    served_names=order.served_names,
                    memory_items=_items_to_proto(order.memory_items),
                    host_memory_items=_items_to_proto(order.host_memory_items),
                    device_ids=order.device_ids,
                    device_count=order.device_count,
                    in_background=order.is_background,
                )
            )
        case DrainReplica(replica_id, timeout_seconds):
            message.drain.CopyFrom(pb.DrainReplica(replica_id=replica_id, timeout=seconds_to_proto(timeout_seconds)))
        case StopReplica(replica_id):
            message.stop.CopyFrom(pb.StopReplica(replica_id=replica_id))
        case EvictRevision(revision):
            message.evict.CopyFrom(pb.EvictRevision(revision=revision))
        case Fence():
            message.fence.SetInParent()
        case SetAdapters(replica_id, adapters):
            names = map(_named_to_proto, adapters)
            message.set_adapters.CopyFrom(pb.SetAdapters(replica_id=replica_id, adapters=names))
        case _:
            _warmth_to_proto(command.order, message)
    return pb.SessionResponse(command=message)


def _warmth_to_proto(order: StageRevision | UnstageRevision | SleepReplica | WakeReplica, message: pb.Command) -> None:
    match order:
        case StageRevision(revision, model, memory_bytes):
            message.stage.CopyFrom(pb.StageRevision(revision=revision, model=model, memory_bytes=memory_bytes))
        case UnstageRevision(revision):
            message.unstage.CopyFrom(pb.UnstageRevision(revision=revision))
        case SleepReplica(replica_id):
            message.sleep.CopyFrom(pb.SleepReplica(replica_id=replica_id))
        case WakeReplica(replica_id):
            message.wake.CopyFrom(pb.WakeReplica(replica_id=replica_id))


def _adapter_from_proto(message: types_pb2.ReplicaAdapter) -> HeldAdapter:
    return HeldAdapter(
        Adapter(message.adapter.name, message.adapter.model, message.adapter.revision),
        known(int(message.state), AdapterState, AdapterState.LOADING),
        message.failure.reason,
        message.failure.message,
    )


def _adapter_to_proto(held: HeldAdapter) -> types_pb2.ReplicaAdapter:
    state = types_pb2.AdapterState.ValueType(held.state.value)
    message = types_pb2.ReplicaAdapter(adapter=_named_to_proto(held.adapter), state=state)
    if held.failure_reason:
        message.failure.reason, message.failure.message = held.failure_reason, held.failure_message
    return message


def _named_to_proto(adapter: Adapter) -> engine_settings_pb2.LoraAdapter:
    return engine_settings_pb2.LoraAdapter(name=adapter.name, model=adapter.model, revision=adapter.revision)


def _kind_name(kind: types_pb2.MemoryKind.ValueType) -> str:
    known = kind in types_pb2.MemoryKind.values()
    return types_pb2.MemoryKind.Name(kind).removeprefix("MEMORY_KIND_") if known else "OVERHEAD"


def _items_to_proto(items: tuple[tuple[str, int], ...]) -> list[types_pb2.MemoryItem]:
    return [
        types_pb2.MemoryItem(kind=types_pb2.MemoryKind.Value(f"MEMORY_KIND_{kind}"), size_bytes=size)
        for kind, size in items
    ]


def _settings_to_proto(document: str) -> engine_settings_pb2.EngineSettings:
    return json_format.Parse(document or "{}", engine_settings_pb2.EngineSettings(), ignore_unknown_fields=True)


def arrivals_from_proto(message: types_pb2.LoadDelta) -> list[tuple[str, float | None]]:
    """Requests that reached a replica, each with the replica's wall clock in seconds since the epoch, where it said."""
    return [
        (entry.request_id, entry.arrived_at.ToNanoseconds() / 1e9 if entry.HasField("arrived_at") else None)
        for entry in message.started
    ]


def ends_from_proto(message: types_pb2.LoadDelta, now: float) -> list[tuple[str, Finished]]:
    """Requests that ended at a replica, heard of at `now`."""
    return [
        (
            entry.request_id,
            Finished(
                replica_id=message.replica_id,
                status_code=entry.status_code,
                prompt_tokens=entry.prompt_tokens,
                completion_tokens=entry.completion_tokens,
                time_to_first_token_seconds=(
                    entry.time_to_first_token.ToNanoseconds() / 1e9 if entry.HasField("time_to_first_token") else None
                ),
                duration_seconds=entry.duration.ToNanoseconds() / 1e9,
                heard_at=now,
            ),
        )
        for entry in message.finished
    ]


def known(value: int, kinds: type[E], default: D) -> E | D:
    """The member of this value; `default` where this software, older than its peer, has none."""
    try:
        return kinds(value)
    except ValueError:
        return default


def timestamp(seconds: float) -> Timestamp:
    """A point in time, from seconds since the epoch."""
    message = Timestamp()
    message.FromDatetime(datetime.fromtimestamp(seconds, UTC))
    return message
