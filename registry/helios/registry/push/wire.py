"""Pushes as messages and back."""

from helios.api.registry.v1 import push_service_pb2 as pb
from helios.mesh.errors import HeliosError
from helios.registry import wire
from helios.registry.push.records import PushDone, PushEvent


def push_event_to_proto(event: PushEvent) -> pb.PushModelResponse:
    """Returns progress or result on the wire."""
    if not isinstance(event, PushDone):
        return pb.PushModelResponse(progress=wire.progress_to_proto(event))
    done = pb.PushDone(
        revision=event.revision, location=event.location, sent_bytes=event.sent_bytes, known_bytes=event.known_bytes
    )
    return pb.PushModelResponse(done=done)


def push_error_to_proto(error: HeliosError) -> pb.PushModelResponse:
    """Returns what REST callers read of a push that failed in mid-stream."""
    return pb.PushModelResponse(error=wire.ingest_error_to_proto(error).error)


def push_event_from_proto(message: pb.PushModelResponse) -> PushEvent | None:
    """Reads progress or result; None for what this client needs no event for: an error is the call's status, too."""
    if message.HasField("done"):
        done = message.done
        return PushDone(done.revision, done.location, done.sent_bytes, done.known_bytes)
    return wire.progress_from_proto(message.progress) if message.HasField("progress") else None
