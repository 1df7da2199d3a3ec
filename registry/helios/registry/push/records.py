"""What is told of a push, as values. Other components get these types through ``client``."""

from dataclasses import dataclass

from helios.registry.records import IngestProgress


@dataclass(frozen=True, slots=True)
class PushDone:
    """The result of a push.

    Attributes:
        revision: ``sha256:<hex>``, the manifest's digest here and there.
        location: Where it is, by digest; a source of pulls.
        sent_bytes: Bytes of blobs that were sent.
        known_bytes: Bytes of blobs that the target had, in this repository or another one.
    """

    revision: str
    location: str
    sent_bytes: int
    known_bytes: int


PushEvent = IngestProgress | PushDone
