"""What a replica was measured to hold, as a value and as a message."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from helios.api.registry.v1 import profile_service_pb2 as pb
from helios.mesh.errors import InvalidRequest

_SHA256: Final = re.compile(r"[0-9a-f]{64}")
# Measures, and revisions, of one call.
MAX_COUNT: Final = 1_000
# An integer of SQL holds it.
_MAX_BYTES: Final = 1 << 62


@dataclass(frozen=True, slots=True)
class Measure:
    """The most that a replica held beside what it was given (KV cache, adapters).

    Attributes:
        settings_sha256: Of the engine settings that it ran with.
        measured_at: When it was told; None: not yet.
    """

    revision: str
    settings_sha256: str
    is_gpu: bool
    fixed_bytes: int
    measured_at: datetime | None = None

    def check(self) -> "Measure":
        """Returns itself. Raises InvalidRequest (INVALID_MEASURE)."""
        if not _SHA256.fullmatch(self.settings_sha256) or not 0 < self.fixed_bytes < _MAX_BYTES:
            raise InvalidRequest("a measure has a sha256 of settings and some bytes", reason="INVALID_MEASURE")
        return self


def measure_to_proto(measure: Measure) -> pb.MeasuredRevision:
    """Returns a measure on the wire."""
    message = pb.MeasuredRevision(revision=measure.revision)
    message.measure.settings_sha256 = measure.settings_sha256
    message.measure.is_gpu = measure.is_gpu
    message.measure.fixed_bytes = measure.fixed_bytes
    if measure.measured_at is not None:
        message.measure.measured_at.FromDatetime(measure.measured_at)
    return message


def measure_from_proto(message: pb.MeasuredRevision) -> Measure:
    """Reads a measure; ``Measure.check`` judges it."""
    found = message.measure
    at = found.measured_at.ToDatetime(UTC) if found.HasField("measured_at") else None
    return Measure(message.revision, found.settings_sha256, found.is_gpu, found.fixed_bytes, at)
