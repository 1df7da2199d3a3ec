"""Between the contract's messages and the supervisor's records; used by the servicer and the session, and by nothing
else.
"""

from datetime import UTC

from google.protobuf.timestamp_pb2 import Timestamp

from helios.api.fleet.v1 import fleet_service_pb2 as fleet
from helios.api.fleet.v1 import types_pb2 as types
from helios.mesh.durations import seconds_from_proto, seconds_to_proto
from helios.mesh.errors import InvalidRequest
from helios.mesh.transfer.progress import TransferProgress
from helios.worker.replica.adapter_wire import adapter_from_proto, status_from_proto, status_to_proto
from helios.worker.replica.loss_wire import losses_from_proto, losses_to_proto
from helios.worker.replica.settings import EngineSettings
from helios.worker.supervisor.commands import (
    Ack,
    Command,
    Drain,
    Evict,
    SetAdapters,
    Sleep,
    Stage,
    Start,
    Stop,
    Unstage,
    Wake,
)
from helios.worker.supervisor.device_wire import (
    device_to_proto,
    host_to_proto,
    items_from_proto,
    items_to_proto,
    staged_to_proto,
)
from helios.worker.supervisor.records import (
    Failure,
    FinishedRequest,
    Load,
    LoadDelta,
    Order,
    PhaseTiming,
    ProcessIdentity,
    ReplicaState,
    ReplicaView,
    WorkerView,
)
from helios.worker.supervisor.settings_wire import (
    compilation_from_proto,
    compilation_to_proto,
    settings_from_proto,
)


def state_to_proto(state: ReplicaState) -> types.ReplicaState.ValueType:
    """Returns the contract's number of a state."""
    return types.ReplicaState.Value(f"REPLICA_STATE_{state.value}")


def state_from_proto(state: types.ReplicaState.ValueType) -> ReplicaState:
    """Returns a state. Raises InvalidRequest for one that is not set or not known."""
    try:
        return ReplicaState(types.ReplicaState.Name(state).removeprefix("REPLICA_STATE_"))
    except ValueError as error:
        raise InvalidRequest(f"replica state {state} is not known", reason="UNKNOWN_STATE") from error


def failure_from_proto(failure: types.ReplicaFailure) -> Failure:
    """Returns a failure; one without a reason gets a reason all the same, since an empty one would mean success."""
    return Failure(failure.reason or "UNKNOWN", failure.message)


def phase_from_proto(phase: types.PhaseTiming) -> PhaseTiming:
    """Returns a phase."""
    return PhaseTiming(phase.phase, seconds_from_proto(phase.duration))


def load_to_proto(load: Load) -> types.ReplicaLoad:
    """Returns the message of a load."""
    return types.ReplicaLoad(
        running_requests=load.running_requests,
        waiting_requests=load.waiting_requests,
        kv_usage_ratio=load.kv_usage_ratio,
        generated_tokens=load.generated_tokens,
    )


def load_from_proto(load: types.ReplicaLoad) -> Load:
    """Returns a load."""
    return Load(load.running_requests, load.waiting_requests, load.kv_usage_ratio, load.generated_tokens)


def delta_from_proto(delta: types.LoadDelta) -> LoadDelta:
    """Returns a delta."""
    return LoadDelta(
        replica_id=delta.replica_id,
        load=load_from_proto(delta.load),
        started=tuple(request.request_id for request in delta.started),
        arrivals=tuple(
            (request.request_id, request.arrived_at.ToNanoseconds() / 1e9)
            for request in delta.started
            if request.HasField("arrived_at")
        ),
        finished=tuple(_finished_from_proto(request) for request in delta.finished),
        losses=losses_from_proto(delta.kv_cache) if delta.HasField("kv_cache") else None,
    )


def delta_to_proto(delta: LoadDelta) -> types.LoadDelta:
    """Returns the message of a delta."""
    arrivals = dict(delta.arrivals)
    return types.LoadDelta(
        replica_id=delta.replica_id,
        load=load_to_proto(delta.load),
        started=[_started_to_proto(request_id, arrivals.get(request_id)) for request_id in delta.started],
        finished=[_finished_to_proto(request) for request in delta.finished],
        kv_cache=losses_to_proto(delta.losses) if delta.losses is not None else None,
    )


def replica_to_proto(view: ReplicaView) -> types.Replica:
    """Returns the message of a whole replica."""
    order = view.order
    created_at = Timestamp()
    created_at.FromDatetime(order.created_at)
    message = types.Replica(
        replica_id=order.replica_id,
        model=order.model,
        revision=order.revision,
        state=state_to_proto(view.state),
        address=view.address,
        engine=order.engine,
        pid=view.process.pid if view.process else 0,
        phases=[
            types.PhaseTiming(phase=phase.phase, duration=seconds_to_proto(phase.seconds)) for phase in view.phases
        ],
        memory_bytes=view.memory_bytes,
        memory_items=items_to_proto(view.memory_items),
        host_memory_items=items_to_proto(order.host_memory_items),
        measured_bytes=view.measured_bytes,
        device_ids=view.device_ids,
        can_sleep=view.can_sleep,
        wake_count=view.wake_count,
        created_at=created_at,
        max_context_tokens=view.max_context_tokens,
        load=load_to_proto(view.load),
        compilation=compilation_to_proto(order.settings.compilation),
        in_background=order.is_background,
        adapters=map(status_to_proto, view.adapters),
    )
    if view.failure is not None:
        message.failure.CopyFrom(types.ReplicaFailure(reason=view.failure.reason, message=view.failure.message))
    if view.fetch is not None:
        message.fetch.CopyFrom(fetch_to_proto(view.fetch))
    return message


def fetch_to_proto(progress: TransferProgress) -> types.FetchProgress:
    """Returns the message of how far weights are."""
    message = types.FetchProgress(
        done_bytes=progress.done_bytes,
        total_bytes=progress.total_bytes,
        bytes_per_second=progress.bytes_per_second,
    )
    if progress.remaining_seconds is not None:
        message.remaining.CopyFrom(seconds_to_proto(progress.remaining_seconds))
    return message


def replica_from_proto(replica: types.Replica, *, start_ticks: int, lease_id: str) -> ReplicaView:
    """Returns what a replica says of itself. Raises InvalidRequest where it can't be right."""
    if not replica.replica_id or replica.pid <= 1:
        raise InvalidRequest("a hello needs a replica id and a process id", reason="HELLO_INCOMPLETE")
    order = Order(
        replica_id=replica.replica_id,
        model=replica.model,
        revision=replica.revision,
        engine=replica.engine,
        memory_bytes=replica.memory_bytes,
        kv_cache_bytes=0,
        max_context_tokens=0,
        created_at=replica.created_at.ToDatetime(tzinfo=UTC),
        memory_items=items_from_proto(item for item in replica.memory_items if item.kind != types.MEMORY_KIND_SLEEPING),
        host_memory_items=items_from_proto(replica.host_memory_items),
        device_ids=tuple(replica.device_ids),
        device_count=max(1, len(replica.device_ids)),
        settings=EngineSettings(compilation=compilation_from_proto(replica.compilation)),
        is_background=replica.in_background,
    )
    return ReplicaView(
        order=order,
        state=state_from_proto(replica.state),
        address=replica.address,
        process=ProcessIdentity(replica.pid, start_ticks),
        failure=failure_from_proto(replica.failure) if replica.HasField("failure") else None,
        phases=tuple(phase_from_proto(phase) for phase in replica.phases),
        max_context_tokens=replica.max_context_tokens,
        lease_id=lease_id,
        load=load_from_proto(replica.load),
        device_ids=tuple(replica.device_ids),
        can_sleep=replica.can_sleep,
        wake_count=replica.wake_count,
        sleeping_bytes=_sleeping_bytes(replica),
        adapters=tuple(map(status_from_proto, replica.adapters)),
    )


def hello_to_proto(worker: WorkerView, epoch: int) -> fleet.Hello:
    """Returns the message by which a worker introduces itself, and says the highest epoch that it has heard."""
    return fleet.Hello(
        worker_id=worker.worker_id,
        incarnation=worker.incarnation,
        node=worker.node,
        zone=worker.zone,
        devices=[device_to_proto(use) for use in worker.devices],
        engines=worker.engines,
        slot_count=worker.slot_count,
        replicas=[replica_to_proto(view) for view in worker.replicas],
        version=worker.version,
        host_memory=host_to_proto(worker.host),
        staged=[staged_to_proto(view) for view in worker.staged],
        epoch=epoch,
    )


def ack_to_proto(ack: Ack) -> fleet.CommandAck:
    """Returns the message of an ack."""
    return fleet.CommandAck(
        command_id=ack.command_id, refused_reason=ack.refused_reason, message=ack.message, epoch=ack.epoch
    )


def command_from_proto(command: fleet.Command) -> Command:
    """Returns a command. Raises InvalidRequest for one that this version does not know."""
    match command.WhichOneof("command"):
        case "start":
            start = command.start
            return Start(
                replica_id=start.replica_id,
                model=start.model,
                revision=start.revision,
                engine=start.engine or start.engine_settings.engine,
                options=dict(start.engine_settings.options),
                settings=settings_from_proto(start.engine_settings),
                served_names=tuple(start.served_names),
                memory_bytes=start.memory_bytes,
                kv_cache_bytes=start.kv_cache_bytes,
                max_context_tokens=start.max_context_tokens,
                memory_items=items_from_proto(start.memory_items),
                host_memory_items=items_from_proto(start.host_memory_items),
                device_ids=tuple(start.device_ids),
                device_count=start.device_count or 1,
                requested_at=start.requested_at.ToNanoseconds() / 1e9 if start.HasField("requested_at") else 0.0,
                traceparent=start.traceparent,
                is_background=start.in_background,
            )
        case "drain":
            drain = command.drain
            timeout_seconds = seconds_from_proto(drain.timeout) if drain.HasField("timeout") else None
            return Drain(drain.replica_id, timeout_seconds)
        case "stop":
            return Stop(command.stop.replica_id)
        case "evict":
            return Evict(command.evict.revision)
        case "stage":
            return Stage(command.stage.revision, command.stage.model, command.stage.memory_bytes)
        case "unstage":
            return Unstage(command.unstage.revision)
        case "sleep":
            return Sleep(command.sleep.replica_id)
        case "wake":
            return Wake(command.wake.replica_id)
        case "set_adapters":
            said = command.set_adapters
            return SetAdapters(said.replica_id, tuple(map(adapter_from_proto, said.adapters)))
        case _:
            raise InvalidRequest("the command is empty or of a newer version", reason="UNKNOWN_COMMAND")


def _sleeping_bytes(replica: types.Replica) -> int | None:
    left = [item.size_bytes for item in replica.memory_items if item.kind == types.MEMORY_KIND_SLEEPING]
    return left[0] if left and replica.state == types.REPLICA_STATE_ASLEEP else None


def _started_to_proto(request_id: str, arrived_at: float | None) -> types.RequestStarted:
    message = types.RequestStarted(request_id=request_id)
    if arrived_at is not None:
        message.arrived_at.FromNanoseconds(round(arrived_at * 1e9))
    return message


def _finished_from_proto(request: types.RequestFinished) -> FinishedRequest:
    has_first = request.HasField("time_to_first_token")
    return FinishedRequest(
        request_id=request.request_id,
        status_code=request.status_code,
        prompt_tokens=request.prompt_tokens,
        completion_tokens=request.completion_tokens,
        time_to_first_token_seconds=seconds_from_proto(request.time_to_first_token) if has_first else None,
        duration_seconds=seconds_from_proto(request.duration),
    )


def _finished_to_proto(request: FinishedRequest) -> types.RequestFinished:
    first = request.time_to_first_token_seconds
    return types.RequestFinished(
        request_id=request.request_id,
        status_code=request.status_code,
        prompt_tokens=request.prompt_tokens,
        completion_tokens=request.completion_tokens,
        time_to_first_token=seconds_to_proto(first) if first is not None else None,
        duration=seconds_to_proto(request.duration_seconds),
    )
