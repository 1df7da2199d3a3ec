"""Between the fleet's wire types and the proxy's own: plain functions, both ways."""

from datetime import UTC, datetime

from google.protobuf import json_format
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from helios.api.engine.v1 import engine_settings_pb2
from helios.api.fleet.v1 import fleet_service_pb2 as pb
from helios.api.fleet.v1 import types_pb2
from helios.proxy.explain.record import Finished
from helios.proxy.fleet.commands import Command, DrainReplica, EvictRevision, StartReplica, StopReplica
from helios.proxy.fleet.state import Device, DeviceKind, Load, Replica, ReplicaState, WorkerHello
from helios.proxy.traffic import LoadDelta


def hello_from_proto(message: pb.Hello) -> WorkerHello:
    """A worker's introduction."""
    return WorkerHello(
        worker_id=message.worker_id,
        incarnation=message.incarnation,
        node=message.node,
        devices=tuple(device_from_proto(device) for device in message.devices),
        engines=tuple(message.engines),
        slot_count=message.slot_count,
        replicas=tuple(replica_from_proto(replica, message.worker_id) for replica in message.replicas),
        version=message.version,
    )


def device_from_proto(message: pb.Device) -> Device:
    """A device; a kind that this software does not know is UNKNOWN."""
    kinds = {kind.value for kind in DeviceKind}
    kind = DeviceKind(int(message.kind)) if int(message.kind) in kinds else DeviceKind.UNKNOWN
    return Device(message.device_id, kind, message.memory_bytes, message.booked_bytes)


def device_to_proto(device: Device) -> pb.Device:
    """A device."""
    return pb.Device(
        device_id=device.device_id,
        kind=pb.DeviceKind.ValueType(device.kind.value),
        memory_bytes=device.memory_bytes,
        booked_bytes=device.booked_bytes,
    )


def replica_from_proto(message: types_pb2.Replica, worker_id: str) -> Replica:
    """A replica; a state that this software does not know counts as PENDING, so that nothing is sent to it."""
    states = {state.value for state in ReplicaState}
    return Replica(
        replica_id=message.replica_id,
        model=message.model,
        revision=message.revision,
        state=ReplicaState(int(message.state)) if int(message.state) in states else ReplicaState.PENDING,
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
    )


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
        phases=[types_pb2.PhaseTiming(phase=name, duration=duration(seconds)) for name, seconds in replica.phases],
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
        message.created_at.CopyFrom(_timestamp(replica.created_at))
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
    )


def command_to_proto(command: Command) -> pb.SessionResponse:
    """A command, as the message that carries it."""
    message = pb.Command(command_id=command.command_id)
    match command.order:
        case StartReplica() as order:
            message.start.CopyFrom(
                pb.StartReplica(
                    traceparent=order.traceparent,
                    requested_at=_timestamp(order.requested_at) if order.requested_at else None,
                    replica_id=order.replica_id,
                    model=order.model,
                    revision=order.revision,
                    engine=order.engine,
                    memory_bytes=order.memory_bytes,
                    kv_cache_bytes=order.kv_cache_bytes,
                    max_context_tokens=order.max_context_tokens,
                    engine_settings=_settings_to_proto(order.engine_settings),
                    served_names=order.served_names,
                )
            )
        case DrainReplica(replica_id, timeout_seconds):
            message.drain.CopyFrom(pb.DrainReplica(replica_id=replica_id, timeout=duration(timeout_seconds)))
        case StopReplica(replica_id):
            message.stop.CopyFrom(pb.StopReplica(replica_id=replica_id))
        case EvictRevision(revision):
            message.evict.CopyFrom(pb.EvictRevision(revision=revision))
    return pb.SessionResponse(command=message)


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


def _timestamp(seconds: float) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(datetime.fromtimestamp(seconds, UTC))
    return message


def duration(seconds: float) -> Duration:
    """A span of time."""
    message = Duration()
    message.FromNanoseconds(round(seconds * 1e9))
    return message
