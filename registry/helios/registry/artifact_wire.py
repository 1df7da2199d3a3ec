"""Artifacts as messages and back."""

from datetime import UTC

from helios.api.registry.v1 import artifact_service_pb2 as pb
from helios.registry import wire
from helios.registry.artifacts import Artifact, NewArtifact


def artifact_to_proto(artifact: Artifact) -> pb.Artifact:
    """Returns an artifact on the wire."""
    return pb.Artifact(
        kind=artifact.kind,
        key=artifact.key,
        inputs=artifact.inputs,
        revision=artifact.revision,
        digest=artifact.digest,
        size_bytes=artifact.size_bytes,
        producer=artifact.producer,
        created_at=wire.timestamp_to_proto(artifact.created_at),
        used_at=wire.timestamp_to_proto(artifact.used_at),
    )


def artifact_from_proto(message: pb.Artifact) -> Artifact:
    """Reads an artifact."""
    return Artifact(
        kind=message.kind,
        key=message.key,
        inputs=message.inputs,
        revision=message.revision,
        digest=message.digest,
        size_bytes=message.size_bytes,
        producer=message.producer,
        created_at=message.created_at.ToDatetime(UTC),
        used_at=message.used_at.ToDatetime(UTC),
    )


def header_to_proto(new: NewArtifact) -> pb.ArtifactHeader:
    """Returns what is uploaded on the wire."""
    return pb.ArtifactHeader(
        kind=new.kind,
        key=new.key,
        inputs=new.inputs,
        revision=new.revision,
        producer=new.producer,
        manifest=wire.manifest_to_proto(new.manifest),
    )


def header_from_proto(message: pb.ArtifactHeader) -> NewArtifact:
    """Reads what is uploaded; ``NewArtifact.check`` judges it. Raises InvalidRequest (INVALID_MANIFEST)."""
    return NewArtifact(
        kind=message.kind,
        key=message.key,
        inputs=message.inputs,
        revision=message.revision,
        producer=message.producer,
        manifest=wire.manifest_from_proto(message.manifest),
    )
