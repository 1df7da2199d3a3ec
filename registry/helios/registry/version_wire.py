"""Versions as messages and back."""

from datetime import UTC
from typing import Final

from helios.api.registry.v1 import version_service_pb2 as pb
from helios.registry import wire
from helios.registry.events import Event, EventKind
from helios.registry.history import Cause, Move
from helios.registry.records import ResolvedModel

_CAUSES: Final = {
    Cause.INGEST: pb.MOVE_CAUSE_INGEST,
    Cause.TAG: pb.MOVE_CAUSE_TAG,
    Cause.ROLLBACK: pb.MOVE_CAUSE_ROLLBACK,
    Cause.DELETE: pb.MOVE_CAUSE_DELETE,
    Cause.PROMOTION: pb.MOVE_CAUSE_PROMOTION,
}
_CAUSES_BACK: Final = {number: cause for cause, number in _CAUSES.items()}


def resolved_to_proto(resolved: ResolvedModel) -> pb.ResolveModelResponse:
    """Returns what a reference means on the wire."""
    return pb.ResolveModelResponse(
        model=wire.model_to_proto(resolved.model), revision=wire.revision_to_proto(resolved.revision)
    )


def resolved_from_proto(message: pb.ResolveModelResponse) -> ResolvedModel:
    """Reads what a reference means."""
    return ResolvedModel(wire.model_from_proto(message.model), wire.revision_from_proto(message.revision))


def move_to_proto(move: Move) -> pb.Move:
    """Returns a move on the wire."""
    return pb.Move(
        version=move.version,
        tag=move.tag,
        revision=move.revision or "",
        cause=_CAUSES[move.cause],
        actor=move.actor,
        at=wire.timestamp_to_proto(move.at),
    )


def move_from_proto(message: pb.Move) -> Move:
    """Reads a move; a cause of a newer registry is told as a tag's."""
    return Move(
        version=message.version,
        tag=message.tag,
        revision=message.revision or None,
        cause=_CAUSES_BACK.get(message.cause, Cause.TAG),
        actor=message.actor,
        at=message.at.ToDatetime(UTC),
    )


def event_to_proto(event: Event) -> pb.ModelEvent:
    """Returns an event on the wire."""
    return pb.ModelEvent(
        version=event.version,
        kind=pb.EventKind.Value(f"EVENT_KIND_{event.kind.name}"),
        model=event.model,
        detail=dict(event.detail),
        actor=event.actor,
        at=wire.timestamp_to_proto(event.at),
    )


def event_from_proto(message: pb.ModelEvent) -> Event | None:
    """Reads an event; None for a kind of a newer registry."""
    name = pb.EventKind.Name(message.kind).removeprefix("EVENT_KIND_") if message.kind in pb.EventKind.values() else ""
    if name not in EventKind.__members__:
        return None
    return Event(
        version=message.version,
        kind=EventKind[name],
        model=message.model,
        detail=dict(message.detail),
        actor=message.actor,
        at=message.at.ToDatetime(UTC),
    )
