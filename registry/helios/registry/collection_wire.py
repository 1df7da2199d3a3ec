"""Messages of garbage collection as values and back, for servicer and client alike."""

from datetime import timedelta
from typing import Final

from helios.api.registry.v1 import registry_service_pb2 as pb
from helios.mesh.errors import InvalidRequest
from helios.registry.collection import CollectionReport

_MAX_GRACE: Final = timedelta(days=3650)


def collection_to_proto(*, is_dry_run: bool, grace: timedelta | None) -> pb.CollectBlobsRequest:
    """Returns what to collect on the wire."""
    request = pb.CollectBlobsRequest(dry_run=is_dry_run)
    if grace is not None:
        request.grace.FromTimedelta(grace)
    return request


def grace_from_proto(message: pb.CollectBlobsRequest) -> timedelta | None:
    """Reads a grace period; None where none is given. Raises InvalidRequest (INVALID_GRACE)."""
    if not message.HasField("grace"):
        return None
    grace = message.grace.ToTimedelta()
    if not timedelta(0) <= grace <= _MAX_GRACE:
        raise InvalidRequest("grace lies between 0 and ten years", reason="INVALID_GRACE", metadata={"param": "grace"})
    return grace


def collection_report_to_proto(report: CollectionReport) -> pb.CollectBlobsResponse:
    """Returns a report on the wire."""
    return pb.CollectBlobsResponse(
        removed_count=report.removed_count,
        removed_bytes=report.removed_bytes,
        spared_count=report.spared_count,
        spared_bytes=report.spared_bytes,
        reachable_count=report.reachable_count,
        reachable_bytes=report.reachable_bytes,
        unfinished_count=report.unfinished_count,
        missing=[f"sha256:{value}" for value in report.missing],
        missing_count=report.missing_count,
    )


def collection_report_from_proto(message: pb.CollectBlobsResponse) -> CollectionReport:
    """Reads a report."""
    return CollectionReport(
        removed_count=message.removed_count,
        removed_bytes=message.removed_bytes,
        spared_count=message.spared_count,
        spared_bytes=message.spared_bytes,
        reachable_count=message.reachable_count,
        reachable_bytes=message.reachable_bytes,
        unfinished_count=message.unfinished_count,
        missing=tuple(value.removeprefix("sha256:") for value in message.missing),
        missing_count=message.missing_count,
    )
