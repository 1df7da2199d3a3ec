"""Explanations as messages of the admin contract."""

from helios.api.admin.v1 import admin_service_pb2 as admin_pb
from helios.api.admin.v1 import explanation_pb2 as pb
from helios.mesh.durations import seconds_to_proto
from helios.proxy.catalogue import shown
from helios.proxy.explain.journal import FailedReplica, Journal
from helios.proxy.explain.record import Move, Record, RequestState
from helios.proxy.explain.start import Start
from helios.proxy.explain.timeline import Phase
from helios.proxy.fleet.wire import known, replica_to_proto, timestamp
from helios.proxy.routing.pick import Pick

_EXCLUDED_COUNT = 16


def summary_to_proto(record: Record) -> pb.RequestSummary:
    """What became of a request."""
    began, ended, first = record.began_at, record.ended_at, record.first_token_at
    finished = record.finished
    message = pb.RequestSummary(
        request_id=record.request_id,
        arrived_at=timestamp(began + record.wall_offset),
        requested_model=shown(record.name),
        model=record.model,
        revision=record.revision,
        state=pb.RequestState.ValueType(record.state.value),
        is_held=record.hold is not None,
    )
    if record.refusal is not None:
        message.reason, message.status_code = record.refusal.reason, record.refusal.grpc_code
    if record.arrived is not None:
        message.replica_id = record.arrived.replica_id
    if finished is not None:
        message.replica_id, message.status_code = finished.replica_id, finished.status_code
        message.prompt_tokens, message.completion_tokens = finished.prompt_tokens, finished.completion_tokens
    if first is not None:
        message.time_to_first_token.CopyFrom(seconds_to_proto(first - began))
    if ended is not None:
        message.duration.CopyFrom(seconds_to_proto(max(0.0, ended - began)))
    return message


def explanation_to_proto(record: Record, now: float) -> pb.RequestExplanation:
    """Where a request's time went."""
    message = pb.RequestExplanation(
        summary=summary_to_proto(record),
        phases=[_phase_to_proto(phase) for phase in record.phases(now)],
        explained=seconds_to_proto(record.explained_seconds(now)),
        starts=[_start_to_proto(start, now) for start in record.hold.starts] if record.hold is not None else [],
        moves=[_move_to_proto(move, record.wall_offset) for move in record.moves],
    )
    if record.pick is not None:
        message.pick.CopyFrom(_pick_to_proto(record.pick, record.excluded))
    if record.refusal is not None:
        message.refusal.reason, message.refusal.message = record.refusal.reason, record.refusal.message
        if record.refusal.retry_after_seconds is not None:
            message.refusal.retry_after.CopyFrom(seconds_to_proto(record.refusal.retry_after_seconds))
    return message


def state_from_proto(state: pb.RequestState.ValueType) -> RequestState | None:
    """A state to filter by; None for all, and for one that this software does not know."""
    return known(int(state), RequestState, None)


def failure_to_proto(failed: FailedReplica, wall_offset: float) -> admin_pb.FailedReplica:
    """A replica that failed."""
    return admin_pb.FailedReplica(
        replica=replica_to_proto(failed.replica),
        worker_id=failed.replica.worker_id,
        failed_at=timestamp(failed.at + wall_offset),
    )


def _phase_to_proto(phase: Phase) -> pb.ExplainedPhase:
    return pb.ExplainedPhase(phase=phase.phase, duration=seconds_to_proto(phase.seconds), reason=phase.reason)


def _move_to_proto(move: Move, wall_offset: float) -> pb.RequestMove:
    return pb.RequestMove(
        left=move.left,
        reached=move.reached,
        is_drain=move.is_drain,
        reason=move.reason,
        token_count=move.token_count,
        waited=seconds_to_proto(move.waited_seconds),
        told_at=timestamp(move.at + wall_offset),
    )


def _pick_to_proto(pick: Pick, excluded: tuple[tuple[str, str], ...]) -> pb.PickExplanation:
    chosen = [choice.replica_id for choice in pick.choices]
    others = [candidate for candidate in pick.considered if candidate.replica_id not in chosen]
    message = pb.PickExplanation(candidate_count=pick.candidate_count, weights=pick.shares)
    for place, candidate in enumerate([*pick.choices, *others], start=1):
        scores = {
            "queue": candidate.queue_score,
            "running": candidate.running_score,
            "kv_usage": candidate.kv_score,
        }
        if candidate.prefix_score:
            scores["prefix"] = candidate.prefix_score
        if candidate.session_score:
            scores["session"] = candidate.session_score
        if candidate.locality_score:
            scores["locality"] = candidate.locality_score
        message.candidates.add(
            replica_id=candidate.replica_id,
            address=candidate.address,
            score=candidate.score,
            scores=scores,
            choice=place if place <= len(chosen) else 0,
        )
    for replica_id, reason in excluded[:_EXCLUDED_COUNT]:
        message.excluded.add(replica_id=replica_id, reason=reason)
    return message


def _start_to_proto(start: Start, now: float) -> pb.StartExplanation:
    return pb.StartExplanation(
        replica_id=start.replica_id,
        worker_id=start.worker_id,
        requested_by=start.requested_by,
        placement=start.placement,
        waits=[wait.reason for wait in start.waits],
        phases=[_phase_to_proto(phase) for phase in Journal.start_phases(start, now)],
        failure=start.failure,
    )
